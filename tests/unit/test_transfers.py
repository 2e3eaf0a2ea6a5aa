"""Ranks learn of copies together: whatever each knows by itself and when, all of them hear of the
same copies in the same pass, and of one that failed on any of them as failed."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.engine.kv import transfers as module
from pascal_sglang.engine.kv.transfers import Transfers

ALONE = SimpleNamespace(attn_tp_cpu_group=SimpleNamespace(size=lambda: 1))


class Copies:
    """A device of one rank. What is copied is how the copy ends: 'late' ones are under way until
    they are waited for, or `land`."""

    def __init__(self):
        self.landed, self.waited = False, []

    def query(self, how):
        return None if how == "late" and not self.landed else how != "fails"

    def wait(self, how):
        self.waited.append(how)
        return how != "fails"


def begin(transfers, copies, how):
    return transfers.begin([(copies, how)] if how != "not begun" else [], failed=how == "not begun")


ENDS = st.sampled_from(["done", "late", "fails", "not begun"])


@given(st.lists(st.tuples(ENDS, ENDS), max_size=12), st.lists(st.booleans(), max_size=24))
def test_all_ranks_hear_the_same_in_the_same_pass(pairs, landings):
    devices = [Copies(), Copies()]
    ranks = [Transfers(ALONE), Transfers(ALONE)]
    begun, known = [], []
    for number in range(len(pairs) + len(landings) + 40):
        if number < len(pairs):
            begun.append([begin(*both) for both in zip(ranks, devices, pairs[number], strict=True)])
        landed = landings[number] if number < len(landings) else number > len(pairs)
        devices[number % 2].landed |= landed
        words = [transfers.progress() for transfers in ranks]
        agreed = [min(word) for word in zip(*words, strict=True)]
        for transfers in ranks:
            transfers.heard(*agreed)
        known.append([[one.complete for one in both] for both in begun])
        assert all(first == second for first, second in known[-1]), "one rank knows more"
    for ends, both in zip(pairs, begun, strict=True):
        good = not {"fails", "not begun"} & set(ends)
        assert [one.complete for one in both] == [good, good]
    assert devices[0].waited == devices[1].waited == []


def test_what_is_needed_now_is_waited_for_and_the_ranks_meet_once(monkeypatch):
    met, told, meeting, here = threading.Barrier(2), threading.Barrier(2), {}, threading.local()

    def least(scheduler, *values):
        if not values:
            return []
        meeting[here.rank] = values
        scheduler.meetings += 1
        met.wait(60)
        found = [min(both) for both in zip(meeting[0], meeting[1], strict=True)]
        told.wait(60)
        return found

    monkeypatch.setattr(module, "least", least)

    def rank(number):
        here.rank = number
        scheduler, copies = SimpleNamespace(meetings=0), Copies()
        transfers = Transfers(scheduler)
        ends = ["late", "done", "fails" if number else "done", "late"]
        begun = [begin(transfers, copies, how) for how in ends]
        assert transfers.finish(begun[0], begun[1])
        assert not transfers.finish(begun[0], begun[2])
        assert scheduler.meetings == 2, "all together, and what is known is not asked again"
        assert transfers.progress() == (0, float("inf")), "the last one is under way"
        transfers.finish_all()
        assert transfers.progress() == (float("inf"), float("inf"))
        return [one.complete for one in begun]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == [[True, True, False, True]] * 2


def test_alone_nobody_is_met():
    transfers, copies = Transfers(ALONE), Copies()
    late, fails = begin(transfers, copies, "late"), begin(transfers, copies, "fails")
    assert transfers.finish(late)
    assert not transfers.finish(late, fails)


@pytest.mark.parametrize("failed", [True, False])
def test_whether_a_copy_has_begun_is_known_without_waiting(failed):
    transfers, copies = Transfers(ALONE), Copies()
    part = SimpleNamespace(failed=failed)
    assert transfers.is_begun(transfers.begin([(copies, part)])) is not failed
    assert copies.waited == []
