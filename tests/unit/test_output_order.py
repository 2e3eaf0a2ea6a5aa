"""Tokens of a moved request never overtake earlier ones, whatever the pipes do."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.cluster.output_order import CAPACITY, PATIENCE_S, OutputOrder, Row


def test_what_is_early_waits_and_its_pipe_behind_it():
    order = OutputOrder()
    assert order.admit(0, "a", [Row("r", 0, 3, False)], 0.0) == ["a"]
    assert order.admit(1, "c", [Row("r", 5, 6, False)], 0.1) == []
    assert order.admit(1, "d", [Row("s", 0, 1, False)], 0.2) == [], "behind it in the same pipe"
    assert order.admit(2, "x", [Row("t", 0, 1, False)], 0.2) == ["x"]
    assert order.admit(0, "b", [Row("r", 3, 5, False)], 0.3) == ["b", "c", "d"]
    assert (order.held, len(order)) == (2, 0)


def test_a_name_that_comes_again_begins_anew():
    order = OutputOrder()
    for _ in range(2):
        assert order.admit(0, "a", [Row("r", 0, 3, False)], 0.0) == ["a"]
        assert order.admit(0, "b", [Row("r", 3, 4, True)], 0.0) == ["b"]
    order.admit(0, "c", [Row("r", 0, 9, False)], 0.0)  # Aborted: no end ever comes.
    assert order.admit(1, "d", [Row("r", 0, 1, False)], 0.0) == ["d"]
    assert order.admit(1, "e", [Row("r", 1, 2, False)], 0.0) == ["e"]


def test_what_never_comes_ends_the_request_it_is_missing_from():
    order = OutputOrder()
    order.admit(1, "b", [Row("s", 0, 1, False), Row("r", 5, 6, False)], 0.0)
    order.admit(1, "c", [Row("r", 6, 7, True)], 0.0)
    assert order.overdue(PATIENCE_S) == []
    assert order.overdue(PATIENCE_S + 1) == [("b", [1]), ("c", [])]
    assert (order.broken, len(order)) == (1, 0)


def test_who_is_silent_for_the_longest_time_is_forgotten_first():
    """Requests that were aborted while they waited leave no last row; they must not push out one
    that is told of in between."""
    order = OutputOrder()
    order.admit(0, "a", [Row("r", 0, 1, False)], 0.0)
    for number in range(1, 4):
        rows = [Row(f"{number} {i}", 0, 1, False) for i in range(CAPACITY // 2)]
        assert order.admit(0, "b", rows, 0.0) == ["b"]
        assert order.admit(0, "c", [Row("r", number, number + 1, False)], 0.0) == ["c"]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_mixture_of_pipes_is_put_in_order(data):
    """Requests hop between three instances; each pipe keeps its order, and is read at any time."""
    pipes, tokens, at = ([], [], []), {}, {}
    for _ in range(data.draw(st.integers(1, 40))):
        home = data.draw(st.integers(0, 2))
        rows = []
        for rid in "rst":
            if at.get(rid, home) != home and data.draw(st.booleans()):
                at[rid] = home
            if at.setdefault(rid, home) == home:
                begin = tokens.get(rid, 0)
                tokens[rid] = begin + data.draw(st.integers(0, 2))
                rows.append(Row(rid, begin, tokens[rid], False))
        pipes[home].append(rows)
    order, seen = OutputOrder(), {}
    while any(pipes):
        home = data.draw(st.sampled_from([i for i in range(3) if pipes[i]]))
        rows = pipes[home].pop(0)
        for passed in order.admit(home, rows, rows, 0.0):
            for row in passed:
                if row.end > row.begin:
                    assert row.begin == seen.get(row.rid, 0)
                    seen[row.rid] = row.end
    assert len(order) == 0
    assert seen == {rid: n for rid, n in tokens.items() if n}
