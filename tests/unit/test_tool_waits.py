"""Conversations that wait for a tool: how long their KV is kept, and who goes on with them."""

import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.policy.tool_waits import (
    FIRST_KEEP_S,
    LEAST_KEEP_S,
    LEAST_SEEN,
    MOST_CONVERSATIONS,
    MOST_KEEP_S,
    MOST_SEEN,
    OPENING,
    QUANTILE,
    ToolWaits,
    WaitTimes,
    distinct_tokens,
    goes_on_with,
    shared_tokens,
)

SECONDS = st.floats(0, 2000, allow_nan=False)
TOKENS = st.lists(st.integers(0, 3), max_size=60).map(lambda ids: array("q", ids))


def ids_of(*numbers):
    return array("q", numbers)


@given(st.lists(SECONDS, max_size=2 * MOST_SEEN))
def test_kv_is_kept_for_a_quantile_of_the_latest_waits_within_bounds(waits):
    times = WaitTimes()
    for waited_s in waits:
        times.learn(waited_s)
    assert LEAST_KEEP_S <= times.keep_s <= MOST_KEEP_S
    latest = sorted(waits[-MOST_SEEN:])
    if len(latest) < LEAST_SEEN:
        assert times.keep_s == FIRST_KEEP_S
        return
    # The shortest time within which that share of them went on.
    within = sum(waited_s <= times.keep_s for waited_s in latest)
    assert within >= QUANTILE * len(latest) or times.keep_s == MOST_KEEP_S
    less = sum(waited_s < times.keep_s for waited_s in latest)
    assert less < QUANTILE * len(latest) or times.keep_s == LEAST_KEEP_S


@given(st.lists(SECONDS, min_size=LEAST_SEEN, max_size=MOST_SEEN), st.randoms())
def test_the_order_of_waits_does_not_matter_and_longer_ones_keep_kv_no_shorter(waits, random):
    def keep_s(each):
        times = WaitTimes()
        for waited_s in each:
            times.learn(waited_s)
        return times.keep_s

    shuffled = list(waits)
    random.shuffle(shuffled)
    assert keep_s(shuffled) == keep_s(waits)
    assert keep_s([2 * waited_s for waited_s in waits]) >= keep_s(waits)


@pytest.mark.parametrize("nonsense", [-1.0, math.inf, math.nan])
def test_what_is_no_time_is_not_learnt(nonsense):
    times = WaitTimes()
    for _ in range(LEAST_SEEN):
        times.learn(nonsense)
    assert times.keep_s == FIRST_KEEP_S


@given(TOKENS, TOKENS)
def test_shared_tokens_are_those_that_both_begin_with(one, other):
    shared = shared_tokens(one, other)
    assert one[:shared] == other[:shared]
    assert shared == shared_tokens(other, one)
    assert shared == min(len(one), len(other)) or one[shared] != other[shared]


@given(st.lists(TOKENS, max_size=12))
def test_what_several_begin_with_counts_once(many):
    prefixes = {tuple(each[: end + 1]) for each in many for end in range(len(each))}
    assert distinct_tokens(many) == len(prefixes)


def conversation(waits, prompt, reply, now=0.0, namespace=None, **more):
    waits.replied(prompt + reply, len(prompt), namespace, now, **more)
    return list(waits)[-1]


# What a template puts behind a question, the last of it to open the thinking.
TURN = array("q", range(8000, 8005))
THINK = array("q", range(8100, 8102))
SYSTEM = array("q", range(1000))
PROMPT = SYSTEM + array("q", [4000]) + TURN + THINK
REPLY = array("q", range(5000, 5050))
RESULT = array("q", range(7000, 7020)) + TURN + THINK


def test_a_prompt_goes_on_with_a_conversation_whose_reply_it_has_or_leaves_out():
    """Templates drop the thinking of earlier replies, and what opened it in the prompt."""
    waits = ToolWaits()
    made = conversation(waits, PROMPT, REPLY)
    before = PROMPT[: -len(THINK)]
    for prompt in (PROMPT + REPLY + RESULT, before + REPLY[20:] + RESULT, before + RESULT):
        assert goes_on_with(made, prompt)
        assert waits.arrived("next", prompt, None, 1.0) is made
        waits.release(lambda _: True)
    for prompt in (ids_of(), PROMPT[:-1], RESULT, before + REPLY[20:] + RESULT[:-1]):
        assert not goes_on_with(made, prompt)
        assert waits.arrived("next", prompt, None, 1.0) is None
    other = array("q", PROMPT)
    other[3] = 9999
    assert not goes_on_with(made, other + REPLY), "it begins otherwise"


def test_only_an_opening_with_which_the_prompt_ends_too_may_be_left_out():
    waits = ToolWaits()
    for length in (OPENING, OPENING + 1):
        opening = array("q", range(8200, 8200 + length))
        made = conversation(waits, SYSTEM + opening, REPLY)
        assert goes_on_with(made, SYSTEM + REPLY + opening) == (length == OPENING)
        assert not goes_on_with(made, SYSTEM + REPLY + opening[:-1] + ids_of(1))


@pytest.mark.parametrize("first", [1, 2, 5, 20])
@pytest.mark.parametrize("second", [1, 2, 5, 20, 300])
def test_another_question_under_the_same_system_prompt_goes_on_with_nothing(first, second):
    waits = ToolWaits()
    asked, other = array("q", range(4000, 4000 + first)), array("q", range(4500, 4500 + second))
    for turn in (TURN + THINK, TURN, THINK[:1]):
        conversation(waits, SYSTEM + asked + turn, REPLY)
        assert waits.arrived("other", SYSTEM + other + turn, None, 1.0) is None
        assert waits.arrived("longer", SYSTEM + asked[:-1] + other + turn, None, 1.0) is None
    for _ in range(LEAST_SEEN):
        assert waits.arrived("other", SYSTEM + other + TURN + THINK, None, 500.0) is None
    assert waits.times.keep_s == FIRST_KEEP_S
    assert waits.of("other") is None


def test_the_same_prompt_again_goes_on_with_nothing():
    waits = ToolWaits()
    made = conversation(waits, PROMPT, REPLY)
    for _ in range(LEAST_SEEN):
        assert waits.arrived("again", PROMPT, None, 500.0) is None
    assert waits.times.keep_s == FIRST_KEEP_S
    assert waits.arrived("next", PROMPT + REPLY + RESULT, None, 500.0) is made


def test_of_several_the_one_with_most_in_common_goes_on_and_only_inside_its_namespace():
    waits = ToolWaits()
    conversation(waits, PROMPT, REPLY, namespace="x")
    best = conversation(waits, PROMPT, REPLY + RESULT, namespace="x")
    conversation(waits, PROMPT, REPLY + RESULT + RESULT, namespace="y")
    conversation(waits, PROMPT, ids_of(1), namespace="x")
    prompt = PROMPT + REPLY + RESULT + RESULT
    assert waits.arrived("next", prompt, "z", 1.0) is None
    assert waits.arrived("next", prompt, "x", 1.0) is best
    assert waits.of("next") is best
    waits.remove(best)
    assert waits.of("next") is None
    assert len(waits) == 3


def test_of_two_alike_the_one_goes_on_that_no_request_goes_on_with_yet():
    waits = ToolWaits()
    both = [conversation(waits, PROMPT, REPLY) for _ in range(2)]
    found = [waits.arrived(name, PROMPT + REPLY + RESULT, None, 1.0) for name in "ab"]
    assert set(found) == set(both)


def test_a_wait_is_learnt_once_whoever_goes_on_and_kv_stays_until_the_turn_begins():
    waits = ToolWaits()
    for number in range(LEAST_SEEN):
        made = conversation(waits, PROMPT, REPLY, now=10.0)
        assert waits.arrived(f"b{number}", PROMPT + REPLY + RESULT, None, 13.0) is made
        assert waits.arrived(f"c{number}", PROMPT + REPLY + RESULT, None, 99.0) is made
        assert waits.of(f"b{number}") is waits.of(f"c{number}") is made
        assert waits.expire(99.0 + MOST_KEEP_S - 1) == []
        waits.remove(made)
    assert waits.times.keep_s == 3.0


def test_a_turn_that_leaves_without_a_start_holds_nothing_and_its_retry_gets_it():
    waits = ToolWaits()
    made = conversation(waits, PROMPT, REPLY, now=10.0)
    assert waits.arrived("b", PROMPT + REPLY + RESULT, None, 13.0) is made
    waits.release(lambda turn: turn != "b")
    assert waits.of("b") is made
    waits.release(lambda turn: turn == "b")
    assert waits.of("b") is None
    assert waits.arrived("c", PROMPT + REPLY + RESULT, None, 500.0) is made
    assert len(waits.times._recent) == 1
    waits.release(lambda _: True)
    assert waits.expire(10.0 + FIRST_KEEP_S) == [made], "not ten minutes later"
    assert len(waits) == 0


def test_what_a_request_asked_for_teaches_nothing_of_tools():
    waits = ToolWaits()
    for _ in range(LEAST_SEEN):
        made = conversation(waits, PROMPT, REPLY, asked_s=600.0)
        assert waits.arrived("b", PROMPT + REPLY + RESULT, None, 599.0) is made
        waits.remove(made)
    assert waits.times.keep_s == FIRST_KEEP_S
    made = conversation(waits, PROMPT, REPLY, asked_s=5.0)
    assert waits.expire(5.0) == [made]
    assert len(waits) == 0


def test_what_is_over_is_told_once_and_remembered_for_as_long_as_it_may_teach():
    waits = ToolWaits()
    made = conversation(waits, PROMPT, REPLY, now=10.0)
    assert waits.expire(10.0 + FIRST_KEEP_S - 1) == []
    assert waits.expire(10.0 + FIRST_KEEP_S) == [made]
    assert waits.expire(10.0 + FIRST_KEEP_S) == []
    late = 10.0 + MOST_KEEP_S - 1
    assert waits.expire(late) == []
    assert waits.arrived("b", PROMPT + REPLY + RESULT, None, late) is made
    for number in range(LEAST_SEEN - 1):
        waits.times.learn(number)
    assert waits.times.keep_s == MOST_KEEP_S - 1
    assert waits.expire(late) == [], "it was told before"
    assert len(waits) == 0


def test_who_asks_for_a_time_gets_it_within_bounds():
    waits = ToolWaits()
    kept = [
        conversation(waits, PROMPT, REPLY, now=5.0, asked_s=seconds).until - 5.0
        for seconds in (0.01, 7.0, 1e9)
    ]
    assert kept == [LEAST_KEEP_S, 7.0, MOST_KEEP_S]


def test_of_too_many_those_are_forgotten_that_are_worth_least_and_the_oldest_of_them():
    waits = ToolWaits()
    kept = conversation(waits, PROMPT, REPLY)
    first = conversation(waits, PROMPT, REPLY)
    over = conversation(waits, PROMPT, REPLY)
    for each in (kept, over):
        each.copy = "some"
    waits.arrived("next", PROMPT + REPLY + RESULT, None, 1.0)
    assert waits.of("next") is over
    over.expired = True
    for _ in range(MOST_CONVERSATIONS - 3):
        assert waits.replied(PROMPT + REPLY, len(PROMPT), None, 2.0) == []
    assert waits.replied(PROMPT + REPLY, len(PROMPT), None, 2.0) == [over]
    assert waits.of("next") is None
    assert waits.replied(PROMPT + REPLY, len(PROMPT), None, 2.0) == [first]
    for each in waits:
        each.copy = "some"
    assert waits.replied(PROMPT + REPLY, len(PROMPT), None, 2.0) == [kept]
    assert len(waits) == MOST_CONVERSATIONS


@given(st.lists(st.tuples(TOKENS, st.integers(0, 60), st.sampled_from("xy")), max_size=20), TOKENS)
def test_an_arrival_finds_what_a_look_at_all_would_and_nothing_is_left_of_what_is_removed(
    made, prompt
):
    waits = ToolWaits()
    for ids, length, namespace in made:
        waits.replied(ids, min(length, len(ids)), namespace, 0.0)
    fit = [each for each in waits if each.namespace == "x" and goes_on_with(each, prompt)]
    found = waits.arrived("next", prompt, "x", 1.0)
    assert (found is None) == (not fit)
    if found is not None:
        assert found in fit
        most = max(shared_tokens(each.ids, prompt) for each in fit)
        assert shared_tokens(found.ids, prompt) == most
    for each in waits:
        waits.remove(each)
    assert waits._index == waits._by_turn == {}


def test_an_abort_of_the_next_turn_forgets_the_conversation():
    waits = ToolWaits()
    other = conversation(waits, PROMPT, REPLY)
    made = conversation(waits, ids_of(7) + PROMPT, REPLY)
    assert waits.arrived("next", ids_of(7) + PROMPT + REPLY + RESULT, None, 1.0) is made
    assert waits.forget(lambda rid: rid == "unknown") == []
    assert waits.forget(lambda rid: rid == "next") == [made]
    assert list(waits) == [other]
    assert waits.of("next") is None


def test_a_conversation_that_goes_on_elsewhere_is_over_and_its_wait_is_learnt():
    waits = ToolWaits()
    for number in range(LEAST_SEEN):
        made = conversation(waits, PROMPT, REPLY, now=float(number))
        assert waits.elsewhere(PROMPT + RESULT, "another", number + 2.0) is None
        assert waits.elsewhere(PROMPT + RESULT, None, number + 2.0) is made
        assert waits.elsewhere(PROMPT + RESULT, None, number + 2.0) is None
    assert (len(waits), waits.times.keep_s) == (0, 2.0)


def test_one_that_a_request_here_goes_on_with_stays():
    """A client that gave up the turn that waits here sends it again, or two go on at once."""
    waits = ToolWaits()
    made = conversation(waits, PROMPT, REPLY)
    waits.arrived("next", PROMPT + RESULT, None, 1.0)
    assert waits.elsewhere(PROMPT + RESULT, None, 1.0) is None
    waits.arrived("twin", PROMPT + RESULT, None, 2.0)
    assert waits.left("nobody") is None
    assert waits.left("next") is None
    assert waits.of("next") is None
    assert waits.left("twin") is made
    assert len(waits) == 0
