"""A request whose KV is on the device, as a batch that decodes in the next step without prefill."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils.common import async_h2d


def joined(running: ScheduleBatch, batch: ScheduleBatch) -> ScheduleBatch:
    """The running batch with another one in it."""
    if running.is_empty():
        return batch
    running.merge_batch(batch)
    running.batch_is_full = False
    return running


def decoding(req: Req, scheduler: Any) -> ScheduleBatch:
    """The batch of one, to be merged into the running one. `req` holds a row and all its KV but the
    last token's."""
    batch = ScheduleBatch.init_new(
        [req],
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        scheduler.enable_overlap,
        scheduler.spec_algorithm,
    )
    batch.prepare_for_prebuilt()
    batch.forward_mode = ForwardMode.DECODE
    # Not a blocking copy: the scheduler would wait here for the step in flight.
    last = async_h2d([req.output_ids[-1]], dtype=torch.int64, device=batch.device)
    scheduler.future_map.stash(batch.req_pool_indices, RelayPayload(bonus_tokens=last))
    return batch
