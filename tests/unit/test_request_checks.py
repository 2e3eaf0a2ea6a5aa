"""What a request may ask for about its own scheduling, and what its asking is good for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.ranking import URGENT, PassInfo, Tuning, fastest_pace
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import Reader, RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.policy.tool_waits import MOST_KEEP_S
from pascal_sglang.request_checks import (
    HINT_TYPE,
    HINT_VERSION,
    STRUCTURED,
    SWITCHES,
    TOOLS,
    asked_tool_wait_s,
    problem_with,
    problem_with_hints,
    reader_of,
    tenant_of,
    tools_of,
)


def asking(pace):
    return {"custom_params": {"pascal": {"answer_tpot_ms": pace}}}


@pytest.mark.parametrize("pace", [1, 1.0, 40, 10_000, None])
def test_what_may_be_asked_for(pace):
    assert problem_with(asking(pace)) is None


@pytest.mark.parametrize(
    "pace", [0.001, 0, -5, 10_001, 1e308, 10**400, math.inf, math.nan, True, "40", [40], {}]
)
def test_what_may_not_is_named_with_the_range(pace):
    problem = problem_with(asking(pace))
    assert "answer_tpot_ms" in problem
    assert "from 1 to 10000" in problem
    assert len(problem) < 200
    assert problem_with([{}, asking(pace)]) == problem, "in a batch too"


def test_parameters_that_are_not_ours_are_left_to_sglang():
    for params in (None, {}, [], "x", [None, 3], {"custom_params": "x"}, {"custom_params": {}}):
        assert problem_with(params) is None
    assert "must be an object" in problem_with({"custom_params": {"pascal": 7}})


@pytest.mark.parametrize("reader", ["human", "program", None])
def test_who_reads_may_be_said(reader):
    assert problem_with({"custom_params": {"pascal": {"reader": reader}}}) is None


@pytest.mark.parametrize("reader", ["", "Human", "robot", 1, True, ["human"], {}])
def test_a_reader_of_no_known_kind_is_refused(reader):
    problem = problem_with({"custom_params": {"pascal": {"reader": reader}}})
    assert problem.startswith("custom_params.pascal.reader must be human or program, not ")
    assert "\n" not in problem


@pytest.mark.parametrize("deadline", [0, -1, 86_401, math.inf, math.nan, True, "5", [5], 10**400])
def test_a_deadline_is_a_number_of_seconds(deadline):
    problem = problem_with({"custom_params": {"pascal": {"ttfo_deadline_s": deadline}}})
    assert problem.startswith("custom_params.pascal.ttfo_deadline_s must be a number of seconds ")
    assert len(problem) < 200
    assert problem_with({"custom_params": {"pascal": {"ttfo_deadline_s": 0.5}}}) is None


@pytest.mark.parametrize("name", ["eta_comments", "brownout"])
def test_a_switch_is_true_or_false(name):
    for value in (True, False, None):
        assert problem_with({"custom_params": {"pascal": {name: value}}}) is None
    for value in (0, 1, "true", [], {}):
        problem = problem_with({"custom_params": {"pascal": {name: value}}})
        assert problem.startswith(f"custom_params.pascal.{name} must be true or false, not ")


@pytest.mark.parametrize(
    ("streamed", "sampling", "reader"),
    [
        (True, {}, Reader.HUMAN),
        (False, {}, Reader.PROGRAM),
        (False, asking(40), Reader.HUMAN),
        (True, {"json_schema": "x", **asking(40)}, Reader.HUMAN),
        (
            False,
            {"custom_params": {"pascal": {"answer_tpot_ms": 40, "reader": "program"}}},
            Reader.PROGRAM,
        ),
        *((True, {name: "x"}, Reader.PROGRAM) for name in STRUCTURED),
        (True, {"json_schema": None}, Reader.HUMAN),
        (False, {"custom_params": {"pascal": {"reader": "human"}}}, Reader.HUMAN),
        (True, {"custom_params": {"pascal": {"reader": "program"}}}, Reader.PROGRAM),
        (True, {"custom_params": {"pascal": {"reader": ["program"]}}}, Reader.HUMAN),
        (False, {"custom_params": "x"}, Reader.PROGRAM),
    ],
)
def test_who_reads_follows_from_the_request(streamed, sampling, reader):
    assert reader_of(streamed, sampling) is reader


def decode(tpot, passes, pass_s=0.02, usual=0.1):
    """An answer that gets a token in every pass; its member, and the passes in which it was urgent
    and in which it starved."""
    pacer = Pacer(tpot)
    member = RequestState(0, pacer, RequestStatus.RUNNING, Phase.ANSWERING)
    urgent = starved = 0
    for pass_no in range(passes):
        pass_info = PassInfo(pass_no, pass_no * pass_s, pass_s)
        urgent += POLICIES["pascal"].rank(member, pass_info, Tuning())[0] == URGENT
        starved += bool(pacer.delivered) and pacer.slack(pass_info.now) < 0
        pacer.deliver(pass_info.now, 1, floor=fastest_pace(usual, pass_info))
    return member, urgent, starved


@pytest.mark.parametrize("tpot", [0.001, 0.02, 0.039])
def test_a_pace_that_cannot_be_delivered_is_not_urgent_for_ever(tpot):
    member, urgent, starved = decode(tpot, 2000)
    assert urgent < 100
    assert starved == 0, "its instance is on pace"
    perfect = member.pacer.qoe > 0.999
    assert perfect == (tpot >= 0.02), "quality is measured at the pace asked for"


def test_the_pace_of_everybody_is_owed_even_when_the_engine_is_slow():
    _, urgent, starved = decode(0.1, 200, pass_s=0.2)
    assert urgent == 200
    assert starved > 100
    _, hurried, _ = decode(0.001, 200, pass_s=0.2)
    assert hurried == urgent, "and a hurried request is owed no more"


def test_a_pace_that_can_be_delivered_is_taken_at_its_word():
    member, urgent, _ = decode(0.1, 300)
    own, own_urgent, _ = decode(0.1, 300, usual=1.0)
    assert member.pacer == own.pacer
    assert urgent == own_urgent
    assert member.pacer.pace == member.pacer.tpot
    assert member.pacer.ahead == 0.0


def test_the_lead_survives_a_change_of_what_the_engine_delivers():
    """A slower pass makes the reader slower, never the lead that it has got."""
    pacer = Pacer(0.001)
    for step in range(100):
        pacer.deliver(step * 0.01, 1, floor=0.02)
    assert pacer.shown == pytest.approx(99 * 0.02)
    pacer.deliver(1.0, 1, floor=0.0)
    assert pacer.shown == pytest.approx(99 * 0.02 + 0.001)
    together = Pacer(0.001)
    together.deliver(0.0, 100, every=0.01, floor=0.02)
    assert together.shown == pytest.approx(99 * 0.02)


# Whatever JSON says, or Python's reader takes for JSON.
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
ANYTHING = st.recursive(
    SCALARS | st.sampled_from([10**400, -(10**400), "\ud800", "a\nb" * 99]),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "answer_tpot_ms",
    "reader",
    "ttfo_deadline_s",
    "tool_wait_s",
    *SWITCHES,
    "tenant",
    "tools",
)


def one_line_or_nothing(said):
    if said is not None:
        assert len(said.encode()) < 400
        assert "\n" not in said


@given(name=st.sampled_from(FIELDS), value=ANYTHING)
def test_whatever_a_field_is_the_answer_is_one_line_or_nothing(name, value):
    for sampling in (
        {"custom_params": {"pascal": {name: value}}},
        {"custom_params": {"pascal": value}},
        {"custom_params": value},
        value,
        [value, {"custom_params": {"pascal": {name: value}}}],
    ):
        said = problem_with(sampling)
        one_line_or_nothing(said)
        if said is None and isinstance(sampling, dict):
            custom = sampling.get("custom_params")
            assert isinstance(reader_of(True, sampling), Reader)
            assert tools_of(custom) in ("", *TOOLS)
            assert isinstance(tenant_of(custom), str)
            assert 0 <= (asked_tool_wait_s(custom, None) or 0.0) <= MOST_KEEP_S


@given(value=ANYTHING)
def test_whatever_a_hint_is_the_answer_is_one_line_or_nothing(value):
    action = {"action_type": HINT_TYPE, "action_version": HINT_VERSION}
    for hints in (
        value,
        {"actions": value},
        {"actions": [value, {**action, "payload": value}]},
        [value, {"actions": [{**action, "payload": {"seconds": value}}]}],
    ):
        one_line_or_nothing(problem_with_hints(hints))
        for envelope in hints if isinstance(hints, list) else [hints]:
            assert 0 <= (asked_tool_wait_s(None, envelope) or 0.0) <= MOST_KEEP_S
