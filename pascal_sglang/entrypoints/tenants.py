"""Whose a request is: by its API key, its `user` field, or a header (`--pascal-fairness`).

The name travels to the scheduler as `custom_params["pascal"]["tenant"]`, as a digest: no key is in
a log, a status or a message of ours. What a client puts there itself is overwritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from pascal_sglang.config import FAIRNESS_HEADER, PascalConfig

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


def label(obj: Any, tenant: str) -> None:
    """Note the tenant in the sampling parameters of a request, or of all requests of a batch."""
    params = obj.sampling_params
    if isinstance(params, list):
        obj.sampling_params = [_with_tenant(each, tenant) for each in params]
    else:
        obj.sampling_params = _with_tenant(params, tenant)


def _with_tenant(params: Any, tenant: str) -> Any:
    params = {} if params is None else params
    custom = params.get("custom_params") if isinstance(params, dict) else None
    custom = {} if custom is None else custom
    own = custom.get("pascal") if isinstance(custom, dict) else None
    own = {} if own is None else own
    if not (isinstance(params, dict) and isinstance(custom, dict) and isinstance(own, dict)):
        return params  # SGLang's to refuse.
    return {**params, "custom_params": {**custom, "pascal": {**own, "tenant": tenant}}}


async def labelled(
    start: Callable[[], AsyncGenerator[Any, None]], obj: Any, request: Any, config: PascalConfig
) -> AsyncGenerator[Any, None]:
    """The stream that `start` begins, once the request has its tenant. request: the HTTP request;
    None for one that came another way, which has no name."""
    name = ""
    if request is not None:
        body = None
        if config.fairness == "user":
            # A body that is no JSON has no such field, and gRPC's requests have none at all.
            with suppress(ValueError, RuntimeError, AttributeError):
                body = await request.json()  # Parsed once and cached by Starlette.
        name = name_of(config.fairness, request.headers, body)
    label(obj, digest(name))
    stream = start()
    try:
        async for chunk in stream:
            yield chunk
    finally:
        await stream.aclose()
