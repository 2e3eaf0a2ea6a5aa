"""Counts of penalties that are made at once equal those that SGLang makes token by token."""

import types
from array import array

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.engine.penalties import count_inputs, count_outputs, count_prefilled

VOCABULARY = 12
OUTPUTS = [[3, 3, 7], [], [1, 3, 1, 1, 9], [5]]
PARAMS = [
    {"frequency_penalty": 0.3, "min_new_tokens": 4},
    {"presence_penalty": 1.5},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
    {},
]


class Batch(types.SimpleNamespace):
    pass


def batch(numbers=range(4), **more):
    """A batch of new counts; `number`: whose parameters a request has."""
    tokenizer = types.SimpleNamespace(additional_stop_token_ids=None, eos_token_id=2)
    reqs = [
        types.SimpleNamespace(
            sampling_params=SamplingParams(**PARAMS[number]),
            output_ids=array("q", OUTPUTS[number]),
            eos_token_ids={2},
            tokenizer=tokenizer,
        )
        for number in numbers
    ]
    made = Batch(reqs=reqs, device="cpu", decoding_reqs=None, **more)
    made.spec_algorithm = SpeculativeAlgorithm.NONE
    kinds = (
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
    )
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, made, kinds)
    made.sampling_info = types.SimpleNamespace(penalizer_orchestrator=orchestrator)
    return made


def effect(batch):
    """What the penalties add to logits, and what they divide or multiply them by."""
    added = torch.zeros(len(batch.reqs), VOCABULARY)
    orchestrator = batch.sampling_info.penalizer_orchestrator
    orchestrator.accumulate_additive_penalties(added)
    scales = orchestrator.accumulate_scaling_penalties()
    return added, torch.ones_like(added) if scales is None else scales


def one_by_one(number, output):
    alone = batch([number])
    for token in output:
        alone.sampling_info.penalizer_orchestrator.cumulate_output_tokens(torch.tensor([token]))
    return effect(alone)


def assert_counted(batch, outputs):
    added, scales = effect(batch)
    for number, output in enumerate(outputs):
        alone_added, alone_scales = one_by_one(number, output)
        assert torch.equal(added[number], alone_added[0])
        assert torch.equal(scales[number], alone_scales[0])


def test_a_new_batch_has_counted_what_its_requests_bring():
    made = batch()
    count_outputs(made, OUTPUTS)
    assert_counted(made, OUTPUTS)


def test_what_decodes_in_a_prefill_batch_is_not_counted_again():
    made = batch()
    made.decoding_reqs = made.reqs[2:]
    count_prefilled(made)
    assert_counted(made, [*OUTPUTS[:2], [], []])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_counts_what_goes_into_it(mixed):
    """A mixed step's first inputs are those of its prefill."""
    made = batch()
    count_outputs(made, OUTPUTS)
    made.forward_mode = ForwardMode.MIXED if mixed else ForwardMode.DECODE
    tokens = [3, 4, 1, 5]
    made.input_ids = torch.tensor([8, 8, 8, *tokens[2:]] if mixed else tokens)
    made.decoding_reqs = made.reqs[2:] if mixed else None
    count_inputs(made)
    more = [[], [], [1], [5]] if mixed else [[token] for token in tokens]
    assert_counted(made, [a + b for a, b in zip(OUTPUTS, more, strict=True)])
