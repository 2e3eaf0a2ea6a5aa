"""Whose a request is: by its API key, its `user` field, or a header (`--pascal-fairness`).

The name travels to the scheduler as `custom_params["pascal"]["tenant"]`, as a digest: no key is in
a log, a status or a message of ours. What a client puts there itself is overwritten.
"""

from __future__ import annotations

import hashlib
from typing import Any

from pascal_sglang.config import FAIRNESS_HEADER

# Bytes of a digest.
SIZE = 8
BEARER = "bearer "


def digest(name: str) -> str:
    """What a tenant is called; empty for requests without a name, which are one tenant."""
    return (
        hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=SIZE).hexdigest()
        if name
        else ""
    )


def name_of(fairness: str, headers: Any, body: object) -> str:
    """The tenant's own name, by `PascalConfig.fairness`; empty where the request has none.

    headers: of the HTTP request, whatever their case. body: its JSON, for `user` alone.
    """
    if fairness == "user":
        user = body.get("user") if isinstance(body, dict) else None
        return user if isinstance(user, str) else ""
    if fairness == "api-key":
        given: str = headers.get("authorization") or ""
        is_key = given.lower().startswith(BEARER)
        return given[len(BEARER) :].strip() if is_key else headers.get("x-api-key") or ""
    found: str = headers.get(fairness.removeprefix(FAIRNESS_HEADER)) or ""
    return found
