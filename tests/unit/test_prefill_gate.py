"""Prefills stand back for moves, and never for long."""

from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.engine.migration.prefill_gate import HANDOVER_PASSES, PrefillGate


def test_a_prefill_waits_until_the_request_is_here():
    prefill_gate = PrefillGate()
    prefill_gate.ask(5, HANDOVER_PASSES)
    assert prefill_gate.defers(5, prefill_waits=True, moving=True)
    assert not prefill_gate.defers(6, prefill_waits=True, moving=False)


def test_what_is_asked_for_one_pass_holds_for_one():
    prefill_gate = PrefillGate()
    prefill_gate.ask(5, 1)
    assert prefill_gate.defers(5, prefill_waits=True, moving=True)
    assert not prefill_gate.defers(6, prefill_waits=True, moving=True)


def test_passes_in_which_no_prefill_waits_do_not_count():
    prefill_gate = PrefillGate()
    for pass_no in range(3 * HANDOVER_PASSES):
        prefill_gate.ask(pass_no, HANDOVER_PASSES)
        assert not prefill_gate.defers(pass_no, prefill_waits=False, moving=True)
    assert prefill_gate.defers(pass_no + 1, prefill_waits=True, moving=True)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2 * HANDOVER_PASSES)), min_size=60))
def test_prefills_have_at_least_as_many_passes_after_a_long_wait(asked):
    prefill_gate, deferred = PrefillGate(), []
    for pass_no, (moving, passes) in enumerate(asked):
        prefill_gate.ask(pass_no, passes)
        deferred.append(prefill_gate.defers(pass_no, prefill_waits=True, moving=moving))
    runs = "".join("x" if held else "." for held in deferred)
    assert "x" * (HANDOVER_PASSES + 1) not in runs
    after = runs.split("x" * HANDOVER_PASSES)[1:]
    assert all(rest[:HANDOVER_PASSES].strip(".") == "" for rest in after)
