"""Pieces of host memory: no two overlap, none is lost, holes grow together again."""

from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.engine.kv.range_allocator import RangeAllocator


def test_the_smallest_hole_that_fits_is_taken_and_neighbours_become_one():
    pieces = RangeAllocator(100)
    starts = [pieces.take(n) for n in (10, 30, 10, 20, 30)]
    assert starts == [0, 10, 40, 50, 70]
    assert pieces.largest == 0
    assert pieces.take(1) is None
    pieces.give(10, 30)
    pieces.give(50, 20)
    assert pieces.largest == 30
    assert pieces.take(15) == 50, "not the larger hole before it"
    pieces.give(40, 10)
    assert pieces.largest == 40, "10 to 50"


def test_nothing_to_give():
    assert RangeAllocator(0).largest == 0
    assert RangeAllocator(0).take(1) is None


@given(st.lists(st.integers(-20, 40).filter(bool), max_size=60))
def test_pieces_never_overlap_and_all_come_back(steps):
    """A positive step takes so many entries; a negative one gives that piece of those held back."""
    pieces, held = RangeAllocator(128), []
    for step in steps:
        if step < 0:
            if held:
                pieces.give(*held.pop(-step % len(held)))
            continue
        largest = pieces.largest
        start = pieces.take(step)
        assert (start is None) == (step > largest)
        if start is not None:
            held.append((start, step))
        taken = [place for first, count in held for place in range(first, first + count)]
        assert len(taken) == len(set(taken))
        assert all(0 <= place < 128 for place in taken)
    for piece in held:
        pieces.give(*piece)
    assert pieces.largest == 128
