"""The logit processors of the demo models, on requests as a scheduler shows them to a processor."""

from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from pascal_sglang.config import PascalConfig
from pascal_sglang.demo import smollm2, tiny
from pascal_sglang.demo.budget import DemoThinkingBudget, TinyOwnLengths, TinyThinkingBudget
from pascal_sglang.entrypoints.preflight import idle_budget
from pascal_sglang.request_checks import thinking_budget_of

PROMPT = [7, 8, 9]
WORD, OTHER_WORD = 97, 98
VOCABULARY = 300


def reloaded(processor):
    """As a server gets it: through its serialised form."""
    return CustomLogitProcessor.from_str(processor.to_str())


def generate(processor, wants, params, *, late=0, prompt=PROMPT):
    """Greedy ids when the model's favourites are `wants`, best first, one row per step.

    With `late`, `output_ids` misses the newest tokens, as under overlap scheduling.
    """
    sampled = []
    params = dict(params)
    for favourites in wants:
        visible = sampled[: len(sampled) - late] if late else sampled
        params["__req__"] = SimpleNamespace(
            origin_input_ids=array("q", prompt),
            output_ids=array("q", visible),
            kv=SimpleNamespace(kv_committed_len=len(prompt) + len(sampled)),
        )
        logits = torch.zeros(1, VOCABULARY)
        for rank, token in enumerate(favourites):
            logits[0, token] = 10.0 - rank
        sampled.append(int(processor(logits, [params]).argmax()))
    return sampled


late = pytest.mark.parametrize("late", [0, 1])


@late
@pytest.mark.parametrize("budget", [0, 1, 2, 5])
def test_tiny_thinks_exactly_its_budget(budget, late):
    wants = [[tiny.END_THINK_ID, tiny.THINK_ID, WORD]] * 8
    ids = generate(reloaded(TinyThinkingBudget), wants, {"thinking_budget": budget}, late=late)
    expected = [WORD] * 8
    expected[budget] = tiny.END_THINK_ID
    assert ids == expected


@late
def test_tiny_ends_both_phases_by_itself_where_it_is_told_to(late):
    wants = [[tiny.END_OF_TURN_ID, tiny.END_THINK_ID, tiny.THINK_ID, WORD]] * 9
    ids = generate(reloaded(TinyOwnLengths), wants, {"own_lengths": [3, 5]}, late=late)
    assert ids == [*[WORD] * 3, tiny.END_THINK_ID, *[WORD] * 4, tiny.END_OF_TURN_ID]
    assert thinking_budget_of({"own_lengths": [3, 5]}) is None, "the server knows nothing of it"


@pytest.mark.parametrize("params", [{}, {"thinking_budget": None}, {"thinking_budget": "3"}])
def test_tiny_leaves_requests_without_a_budget_alone(params):
    wants = [[tiny.END_THINK_ID, WORD]] * 3
    assert generate(reloaded(TinyThinkingBudget), wants, params) == [tiny.END_THINK_ID] * 3


@late
@pytest.mark.parametrize("budget", [0, 1, 2, 5])
def test_demo_closes_its_thinking_once(budget, late):
    wants = [[smollm2.END_THINK_ID, smollm2.THINK_ID, WORD]] * 8
    ids = generate(reloaded(DemoThinkingBudget), wants, {"thinking_budget": budget}, late=late)
    expected = [WORD] * 8
    expected[budget] = smollm2.END_THINK_ID
    assert ids == expected


@late
@pytest.mark.parametrize("params", [{}, {"thinking_budget": 50}])
def test_demo_answers_where_it_would_have_ended_its_turn(params, late):
    end = [smollm2.END_OF_TURN_ID, OTHER_WORD]
    wants = [[WORD], [WORD], end, [WORD], end]
    ids = generate(reloaded(DemoThinkingBudget), wants, params, late=late)
    assert ids == [WORD, WORD, smollm2.END_THINK_ID, WORD, smollm2.END_OF_TURN_ID]


@late
def test_demo_never_answers_with_nothing(late):
    wants = [[smollm2.END_OF_TURN_ID, WORD]] * 3
    ids = generate(reloaded(DemoThinkingBudget), wants, {"thinking_budget": 9}, late=late)
    assert ids == [smollm2.END_THINK_ID, WORD, smollm2.END_OF_TURN_ID]


def test_demo_closes_again_when_the_marker_was_dropped_with_a_retraction():
    params = {"thinking_budget": 2, DemoThinkingBudget.CLOSED_AT: 2}
    ids = generate(reloaded(DemoThinkingBudget), [[WORD]] * 3, params)
    assert ids == [WORD, WORD, smollm2.END_THINK_ID]


def test_demo_leaves_a_request_that_shall_not_think_alone():
    prompt = [smollm2.THINK_ID, 198, 198, smollm2.END_THINK_ID, 198, 198]
    wants = [[WORD], [smollm2.END_OF_TURN_ID]]
    ids = generate(reloaded(DemoThinkingBudget), wants, {"thinking_budget": 0}, prompt=prompt)
    assert ids == [WORD, smollm2.END_OF_TURN_ID]


@pytest.mark.parametrize("processor", [DemoThinkingBudget, TinyThinkingBudget])
@pytest.mark.parametrize("params", [None, [None], [{}], [{"thinking_budget": 1}]])
def test_nothing_to_go_by_changes_nothing(processor, params):
    logits = torch.randn(1, VOCABULARY)
    assert torch.equal(reloaded(processor)(logits.clone(), params), logits)


@pytest.mark.parametrize("processor", [DemoThinkingBudget, TinyThinkingBudget])
def test_rows_are_independent(processor):
    def params(sampled, budget):
        request = SimpleNamespace(
            origin_input_ids=array("q", PROMPT),
            output_ids=array("q", [WORD] * sampled),
            kv=SimpleNamespace(kv_committed_len=len(PROMPT) + sampled),
        )
        return {"thinking_budget": budget, "__req__": request}

    end = {DemoThinkingBudget: smollm2.END_THINK_ID, TinyThinkingBudget: tiny.END_THINK_ID}
    logits = torch.zeros(3, VOCABULARY)
    logits[:, WORD] = 1.0
    out = reloaded(processor)(logits, [params(3, 3), None, params(3, 4)])
    assert out.argmax(dim=1).tolist() == [end[processor], WORD, WORD]


@pytest.mark.parametrize(
    ("budget", "algorithm", "said"),
    [(48, "EAGLE", True), (48, None, False), (None, "EAGLE", False), (0, "STANDALONE", True)],
)
def test_a_budget_that_drafts_leave_without_effect_is_said_at_start(budget, algorithm, said):
    config = PascalConfig(default_thinking_budget=budget)
    line = idle_budget(config, SimpleNamespace(speculative_algorithm=algorithm))
    assert (line is not None) == said
    assert not said or f"--speculative-algorithm {algorithm}" in line
