"""Ranges of host memory: no two overlap, none is lost, holes grow together again, and what is free
is given."""

from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.engine.kv.range_allocator import RangeAllocator


def test_the_smallest_hole_that_fits_is_taken_and_neighbours_become_one():
    memory = RangeAllocator(100)
    taken = [memory.take(n) for n in (10, 30, 10, 20, 30)]
    assert taken == [[(0, 10)], [(10, 40)], [(40, 50)], [(50, 70)], [(70, 100)]]
    assert memory.free == 0
    assert memory.take(1) is None
    memory.give(taken[1])
    memory.give(taken[3])
    assert memory.take(15) == [(50, 65)], "not the larger hole before it"
    memory.give([(50, 65)])
    memory.give(taken[2])
    assert memory.take(60) == [(10, 70)], "one hole"


def test_memory_that_lies_scattered_is_given_too():
    memory = RangeAllocator(100)
    taken = [memory.take(n) for n in (10, 20, 10, 30, 30)]
    memory.give(taken[0])
    memory.give(taken[3])
    assert memory.take(41) is None
    assert memory.take(35) == [(40, 70), (0, 5)], "the largest hole first"
    assert memory.free == 5


def test_nothing_to_give():
    assert RangeAllocator(0).free == 0
    assert RangeAllocator(0).take(1) is None


@given(st.lists(st.integers(-20, 40).filter(bool), max_size=60))
def test_ranges_never_overlap_and_all_come_back(steps):
    """A positive step takes so many entries; a negative one gives back what an earlier one took."""
    memory, held = RangeAllocator(128), []
    for step in steps:
        if step < 0:
            if held:
                memory.give(held.pop(-step % len(held)))
            continue
        free = memory.free
        found = memory.take(step)
        assert (found is None) == (step > free)
        if found is not None:
            assert sum(end - begin for begin, end in found) == step
            held.append(found)
        taken = [place for each in held for begin, end in each for place in range(begin, end)]
        assert len(taken) == len(set(taken)) == 128 - memory.free
        assert all(0 <= place < 128 for place in taken)
    for each in held:
        memory.give(each)
    assert memory.take(128) == [(0, 128)]
