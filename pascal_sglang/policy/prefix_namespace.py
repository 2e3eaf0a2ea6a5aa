"""Inside of what KV of equal tokens is shared."""

from __future__ import annotations

from typing import Any, NamedTuple


class Namespace(NamedTuple):
    """What SGLang's key of the prefix cache has besides tokens: KV is shared only inside of it.

    extra_key: with the LoRA adapter's id behind it, where the request has one.
    """

    extra_key: str | None = None
    cache_salt: str | None = None


PLAIN = Namespace()


def namespace_of(req: Any) -> Namespace:
    """Of a request that a scheduler has (SGLang's `Req`)."""
    return Namespace(req.extra_key, getattr(req, "cache_salt", None))


def namespace_sent(req: Any) -> Namespace:
    """Of a request on its way to a scheduler, where `Req` joins what is apart here."""
    extra_key, lora_id = getattr(req, "extra_key", None), getattr(req, "lora_id", None)
    if lora_id is not None:
        extra_key = (extra_key or "") + lora_id
    return Namespace(extra_key, getattr(req, "cache_salt", None) or None)
