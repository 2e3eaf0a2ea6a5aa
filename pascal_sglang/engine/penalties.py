"""What SGLang's penalties have counted of each request's output.

SGLang keeps the counts with the batch: one that is made anew has counted nothing. Under overlap
scheduling SGLang counts the last token that it knows before each decode step, which is not the last
one: that one is being computed. Here each token is counted once, before the first token that comes
after it: those that a request brings into a new batch from its output, and every later one as the
input of the decode step that it goes into, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)
from sglang.srt.utils.common import async_h2d

from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.support import has_penalties


def count_outputs(batch: ScheduleBatch, outputs: Sequence[Sequence[int]]) -> None:
    """Count `outputs` of the first requests of a batch that has just been made."""
    orchestrator = batch.sampling_info.penalizer_orchestrator
    if not orchestrator.is_required:
        return
    rows: list[int] = []
    tokens: list[int] = []
    for row, (req, output) in enumerate(zip(batch.reqs, outputs, strict=False)):
        if output and has_penalties(req.sampling_params):
            rows += [row] * len(output)
            tokens += output
    if tokens:
        at = async_h2d([rows, tokens], dtype=torch.int64, device=batch.device)
        _count(orchestrator, at[0], at[1])


def count_prefilled(batch: ScheduleBatch) -> None:
    """Count what the requests of a new prefill batch bring along. Those that decode in it have been
    counted."""
    fresh = len(batch.reqs) - len(batch.decoding_reqs or ())
    count_outputs(batch, [req.output_ids for req in batch.reqs[:fresh]])


@contextmanager
def counting_inputs(batch: ScheduleBatch, scheduler: SchedulerProtocol) -> Iterator[None]:
    """SGLang prepares decode steps of the batch here. Under overlap scheduling `count_inputs`
    counts in its place."""
    if not (scheduler.enable_overlap and scheduler.spec_algorithm.is_none()):
        yield
        return
    batch.cumulate_penalty_output_tokens = lambda: None
    try:
        yield
    finally:
        batch.__dict__.pop("cumulate_penalty_output_tokens", None)


def count_inputs(batch: ScheduleBatch) -> None:
    """Count the tokens that the requests of a step bring to it, which runs next on this stream and
    whose inputs are resolved. What a prefill brings `count_prefilled` has counted."""
    info = batch.sampling_info
    if batch.spec_algorithm.is_some() or not info.penalizer_orchestrator.is_required:
        return
    if batch.forward_mode.is_decode():
        info.penalizer_orchestrator.cumulate_output_tokens(batch.input_ids[: len(batch.reqs)])
    elif batch.decoding_reqs:
        tokens = batch.input_ids[-len(batch.decoding_reqs) :]
        last = len(batch.reqs)
        rows = torch.arange(last - len(tokens), last, device=tokens.device)
        _count(info.penalizer_orchestrator, rows, tokens)


def _count(orchestrator: Any, rows: torch.Tensor, tokens: torch.Tensor) -> None:
    """Count `tokens` of the requests in `rows`, each as SGLang does when it comes alone."""
    for penalizer in orchestrator.penalizers.values():
        if not penalizer.is_prepared():
            continue
        match penalizer:
            case BatchedFrequencyPenalizer():
                frequency = penalizer.frequency_penalties[rows, 0]
                penalizer.cumulated_frequency_penalties.index_put_(
                    (rows, tokens), frequency, accumulate=True
                )
            case BatchedPresencePenalizer():
                presence = penalizer.presence_penalties[rows, 0]
                penalizer.cumulated_presence_penalties[rows, tokens] = presence
            case BatchedRepetitionPenalizer():
                repetition = penalizer.repetition_penalties[rows, 0]
                penalizer.cumulated_repetition_penalties[rows, tokens] = repetition
            case BatchedMinNewTokensPenalizer():
                penalizer.len_output_tokens.index_add_(
                    0, rows, torch.ones_like(penalizer.len_output_tokens[rows])
                )
            case _:
                raise TypeError(f"{type(penalizer).__name__} is no penalty that is known here")
