"""What a draft model keeps of a request between two steps, under speculative decoding.

Besides its KV, which stands at the same entries as the target model's, that is one row of small
tensors: the last token, the next one that the draft model proposes, and what it reads to go on.
Under overlap scheduling the row is in SGLang's `FutureMap`, otherwise in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.allocation_sizing import (
    get_alloc_len_per_decode,
    get_alloc_reserve_per_decode,
)
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_utils import get_draft_recurrent_hidden_state_spec

from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol

# The fields of SGLang's `EagleDraftInput` and `RelayPayload`, each with the buffer of `FutureMap`
# that has it by request row.
BUFFERS = {
    "bonus_tokens": "output_tokens_buf",
    "topk_p": "topk_p_buf",
    "topk_index": "topk_index_buf",
    "hidden_states": "hidden_states_buf",
    "draft_probs": "draft_probs_buf",
    "dsa_topk_indices": "dsa_topk_indices_buf",
}

# Tensors by field, each of shape (1, ...); without the fields that the draft model does not have.
DraftState = dict[str, torch.Tensor]


def drafts(scheduler: SchedulerProtocol) -> bool:
    """Whether tokens are proposed here, by a draft model or otherwise."""
    return bool(scheduler.spec_algorithm.is_some())


def carries(scheduler: SchedulerProtocol) -> bool:
    """Whether a draft model proposes tokens here whose state is KV and that row."""
    algorithm = scheduler.spec_algorithm
    known = algorithm.is_eagle() or algorithm.is_standalone()
    return bool(known and not algorithm.is_frozen_kv_mtp())


def draft_pools(scheduler: SchedulerProtocol) -> list[Any]:
    """The KV pools of such a draft model, whose entries are numbered as the target model's."""
    if not carries(scheduler):
        return []
    return [runner.token_to_kv_pool for runner in scheduler.draft_worker._draft_model_runners()]


def traveling_rows(
    scheduler: SchedulerProtocol,
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Of each tensor of a state that goes to another instance: its shape behind the first
    dimension, and what it may be of."""
    topk = get_spec().speculative_eagle_topk
    tokens = (torch.int64, torch.int32)
    rows = {
        "bonus_tokens": ((), tokens),
        "topk_p": ((topk,), (torch.float32,)),
        "topk_index": ((topk,), tokens),
    }
    runner = scheduler.draft_worker._draft_model_runners()[0]
    width, dtype = get_draft_recurrent_hidden_state_spec(runner)
    return rows if width is None else {**rows, "hidden_states": ((width,), (dtype,))}


def layout_name(scheduler: SchedulerProtocol) -> str:
    """A name for what the draft model's KV and rows mean; empty without one."""
    if not drafts(scheduler):
        return ""
    spec = get_spec()
    model, topk = spec.speculative_draft_model_path, spec.speculative_eagle_topk
    return f" {spec.speculative_algorithm} {model} topk{topk}"


def step_tokens(scheduler: SchedulerProtocol) -> int:
    """The most tokens that a step gives a request."""
    return int(get_alloc_len_per_decode()) if drafts(scheduler) else 1


def taken_ahead(scheduler: SchedulerProtocol) -> int:
    """KV entries that a request has to have beyond its tokens when a step begins."""
    return int(get_alloc_reserve_per_decode()) if drafts(scheduler) else 1


def state_in_batch(req: Req, batch: ScheduleBatch) -> DraftState:
    """The state of a request of a batch, without overlap scheduling."""
    row = batch.reqs.index(req)
    found = {field: getattr(batch.spec_info, field) for field in BUFFERS}
    return {f: rows[row : row + 1].clone() for f, rows in found.items() if rows is not None}


def state_in_row(req: Req, scheduler: SchedulerProtocol) -> DraftState:
    """The state of a request that has its row, once its last step is over, under overlap
    scheduling."""
    row = req.kv.req_pool_idx
    found = {field: getattr(scheduler.future_map, name) for field, name in BUFFERS.items()}
    return {f: rows[row : row + 1].clone() for f, rows in found.items() if rows is not None}


def payload_of(state: DraftState) -> RelayPayload:
    return RelayPayload(**state)


def input_of(state: DraftState) -> EagleDraftInput:
    """What the next step reads, without overlap scheduling."""
    return EagleDraftInput(**state, num_tokens_per_req=1, num_tokens_for_logprob_per_req=1)
