"""Which requests are SGLang's own: no user waits for them."""

from __future__ import annotations

from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX


def is_health_probe(req: Any) -> bool:
    """`/health` and `/health_generate` send these. A busy scheduler drops them unseen."""
    return isinstance(req.rid, str) and req.rid.startswith(HEALTH_CHECK_RID_PREFIX)


def is_internal(req: Any) -> bool:
    """Health probes, and the prompt pass ahead of parallel samples, of which there is no token.

    req: a `Req` or a `TokenizedGenerateReqInput`.
    """
    return is_health_probe(req) or req.sampling_params.max_new_tokens == 0
