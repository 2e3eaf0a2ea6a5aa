"""A request whose KV is on the device, as a batch that decodes in the next step without prefill."""

from __future__ import annotations

import torch
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils.common import async_h2d

from pascal_sglang.engine.penalties import count_outputs
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


def joined(running: ScheduleBatch, batch: ScheduleBatch) -> ScheduleBatch:
    """The running batch with another one in it."""
    if running.is_empty():
        return batch
    running.merge_batch(batch)
    running.batch_is_full = False
    return running


def decoding(req: Req, scheduler: SchedulerProtocol) -> ScheduleBatch:
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
    # The next step counts the last one, which goes into it.
    count_outputs(batch, [req.output_ids[:-1]])
    # Not a blocking copy: the scheduler would wait here for the step in flight.
    last = async_h2d([req.output_ids[-1]], dtype=torch.int64, device=batch.device)
    _relay(batch.req_pool_indices, last, scheduler)
    return batch


def _relay(rows: torch.Tensor, last: torch.Tensor, scheduler: SchedulerProtocol) -> None:
    """Hand the last tokens to the next step, in the order of steps.

    The step in flight writes its own tokens at its end, and one of its requests may have ended and
    given its row to ours. The scheduler's stream waits for what a step reads, not for that.
    """
    payload = RelayPayload(bonus_tokens=last)
    if not scheduler.enable_overlap:
        scheduler.future_map.stash(rows, payload)
        return
    steps = scheduler.forward_stream
    steps.wait_stream(torch.get_device_module(last.device).current_stream())
    with scheduler.forward_stream_ctx:
        scheduler.future_map.stash(rows, payload)
    for tensor in (rows, last):
        # Made on the scheduler's stream, which must not use their memory again before.
        if tensor.device.type != "cpu":
            tensor.record_stream(steps)
