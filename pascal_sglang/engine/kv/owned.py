"""What a request gives back under `--strip-thinking-cache`.

SGLang leaves the prefix cache nothing but the prompt of a request that has thought. A request that
lost its KV and was prefilled again has its thinking in the prefix cache already, where others may
use it. SGLang counts that as the request's own all the same: it frees what the cache still holds,
or ends the server.
"""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req


def keep_what_is_cached(req: Req) -> None:
    """From now on the request counts as its own no less than the prefix cache has of it."""

    def owned_kv_len() -> int:
        own: int = Req.owned_kv_len(req)
        cached: int = min(req.kv.cache_protected_len, req.kv.kv_committed_len)
        return max(own, cached)

    req.owned_kv_len = owned_kv_len
