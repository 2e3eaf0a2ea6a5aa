"""Requests whose KV is on the device, as a batch that decodes in the next step without prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils.common import async_h2d

from pascal_sglang.engine.kv.drafts import DraftState, input_of, payload_of
from pascal_sglang.engine.penalties import count_outputs
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


def joined(running: ScheduleBatch, batch: ScheduleBatch) -> ScheduleBatch:
    """The running batch with another one in it."""
    if running.is_empty():
        return batch
    running.merge_batch(batch)
    running.batch_is_full = False
    return running


def decoding(
    reqs: list[Req], scheduler: SchedulerProtocol, drafted: Sequence[DraftState | None] = ()
) -> ScheduleBatch:
    """A batch to be merged into the running one. Each of `reqs` holds a row and all its KV but the
    last token's. drafted: their states in the draft model, if there is one."""
    batch = ScheduleBatch.init_new(
        reqs,
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        scheduler.enable_overlap,
        scheduler.spec_algorithm,
    )
    batch.prepare_for_prebuilt()
    batch.forward_mode = ForwardMode.DECODE
    state = _stacked([rows for rows in drafted if rows is not None])
    if state is not None and not scheduler.enable_overlap:
        batch.spec_info = input_of(state)
        return batch
    if state is None:
        # The next step counts the last one, which goes into it.
        count_outputs(batch, [req.output_ids[:-1] for req in reqs])
        # Not a blocking copy: the scheduler would wait here for the step in flight.
        lasts = [req.output_ids[-1] for req in reqs]
        last = async_h2d(lasts, dtype=torch.int64, device=batch.device)
        _relay(batch, {"bonus_tokens": last}, scheduler)
        return batch
    _relay(batch, state, scheduler)
    batch.spec_info = scheduler.future_map.make_staged_spec_input(batch.req_pool_indices)
    return batch


def _stacked(states: Sequence[DraftState]) -> DraftState | None:
    """The states of several requests as one; None of none."""
    if not states:
        return None
    return {field: torch.cat([state[field] for state in states]) for field in states[0]}


def _relay(batch: ScheduleBatch, state: DraftState, scheduler: SchedulerProtocol) -> None:
    """Hand the last tokens to the next step, in the order of steps.

    The step in flight writes its own tokens at its end, and one of its requests may have ended and
    given its row to ours. The scheduler's stream waits for what a step reads, not for that.
    """
    rows, future_map = batch.req_pool_indices, scheduler.future_map
    payload = payload_of(state)
    if not scheduler.enable_overlap:
        future_map.stash(rows, payload)
        return
    steps = scheduler.forward_stream
    steps.wait_stream(torch.get_device_module(rows.device).current_stream())
    used = [rows, *state.values()]
    with scheduler.forward_stream_ctx:
        future_map.stash(rows, payload)
        if scheduler.spec_algorithm.is_some():
            # With drafts a step reads lengths there too: only the device knows them in time.
            future_map.publish(rows, batch.seq_lens)
            used.append(batch.seq_lens)
    for tensor in used:
        # Made on the scheduler's stream, which must not use their memory again before.
        if tensor.device.type != "cpu":
            tensor.record_stream(steps)
