"""Ids of requests that clients may choose."""

import pytest

from pascal_sglang.cluster.messages import MAX_TEXT
from pascal_sglang.request_ids import MAX_ID, problem_with


@pytest.mark.parametrize("rid", [None, "r", "é" * MAX_ID, ["r"] * 9, [None, "r"], 7])
def test_what_sglang_takes_or_refuses_itself_is_left_to_it(rid):
    assert problem_with(rid) is None


@pytest.mark.parametrize("rid", ["x" * (MAX_ID + 1), ["r", "x" * (MAX_ID + 1)]])
def test_a_long_id_is_refused(rid):
    assert problem_with(rid) == f"rid has {MAX_ID + 1} characters; at most {MAX_ID} are allowed."


def test_an_id_that_no_message_can_carry_is_refused():
    assert problem_with("r\ud800") == "rid is no valid Unicode text."


def test_the_number_that_sglang_adds_in_a_batch_still_fits():
    assert MAX_ID + len(f"_{1 << 53}") < MAX_TEXT
