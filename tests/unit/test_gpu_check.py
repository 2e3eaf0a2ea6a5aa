"""The GPU check's judgement and figures, and that its plans can be read."""

from types import SimpleNamespace

import pytest

from evals.arms import load_plan
from evals.gpu import check, figures, identity
from evals.load.server import ArmError
from pascal_sglang.demo.dummy import ARCHITECTURES

AT_REST = {
    "pauses": {"host": 3, "resident": 2, "host_tokens": 900},
    "migrations": {"outgoing": {"moved": 2, "kept:timeout": 1}},
    "policy_errors": 0,
    "kv_tokens": {"capacity": 100, "free": 60, "evictable": 40, "host": 0},
    "costs": {"copy_s": 1e-4, "copy_token_s": 1e-6, "prefill_token_s": 2e-5},
}


def found(stopped=1, **changes):
    rest = [AT_REST | changes, AT_REST | changes]
    return identity.compare([[1, 2], [3]], [[1, 2], [3]], rest, stopped)


def test_identity_holds_when_pauses_and_moves_changed_nothing():
    seen = found()
    assert seen.holds
    assert seen.pauses == {"resident": 4, "host": 6, "recompute": 0}
    assert seen.migrations == {"kept:timeout": 2, "moved": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {"policy_errors": 1},
        {"kv_tokens": AT_REST["kv_tokens"] | {"free": 59}},
        {"kv_tokens": AT_REST["kv_tokens"] | {"host": 1}},
    ],
)
def test_identity_does_not_hold_if_something_went_wrong(changes):
    assert not found(**changes).holds


def test_identity_does_not_hold_for_other_tokens_or_if_nothing_happened():
    other = identity.compare([[1, 2]], [[1, 3]], [AT_REST], 1)
    assert other.different == [0]
    assert not other.holds
    for pauses in ({"resident": 5}, {"host": 5}):
        assert not found(pauses=pauses).holds
    assert not found(migrations={"outgoing": {"kept:timeout": 9}}).holds
    assert not found(stopped=0).holds


def test_a_third_of_the_requests_may_end_by_a_stop_token():
    made = [body["sampling_params"] for body in identity.bodies(30, "processor")]
    assert sum("stop_token_ids" in params for params in made) == 10
    assert all(params["ignore_eos"] == ("stop_token_ids" not in params) for params in made)


def test_overhead_is_per_pass_and_per_scheduler():
    counters = {"pascal:policy_passes_total": 1000.0, "pascal:policy_seconds_total": 0.2}
    run = SimpleNamespace(counters=counters, summary={"duration": 10.0})
    cost = figures.overhead(run, [AT_REST, AT_REST])
    assert cost["policy_us_per_pass"] == pytest.approx(200)
    assert cost["policy_share"] == pytest.approx(0.01)
    assert cost["copy_us_per_pass"] == pytest.approx(2 * (3 * 1e-4 + 900 * 1e-6) * 1e6 / 1000)
    nothing = figures.overhead(SimpleNamespace(counters={}, summary={"duration": 0.0}), [])
    assert nothing["policy_us_per_pass"] is None
    assert any("-" in line for line in figures.overhead_lines({"pascal": nothing}))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["identity", "one", "two"])
def test_every_plan_can_be_read(kind, name):
    plan = load_plan(check.HERE / f"{kind}-{name}.toml", quick=name == "one")
    assert plan.model in {"tiny", *ARCHITECTURES}
    assert ("cpu" in plan.flags) == (kind == "cpu")


@pytest.mark.parametrize(("costs", "known"), [(AT_REST["costs"], ["ours"]), ({}, [])])
def test_an_order_that_measures_no_costs_has_none(monkeypatch, tmp_path, costs, known):
    """Our `fcfs`, which stands for SGLang's order where instances share a device."""
    plan = load_plan(check.HERE / "cpu-two.toml")
    timed = check.Timed(plan, tmp_path / "two.json", deadline=0.0, least_s=40.0)
    monkeypatch.setattr(check.Comparison, "run_once", lambda *_: None)
    monkeypatch.setattr(check.remote, "instances", lambda url: [AT_REST | {"costs": costs}] * 2)
    arm, server = SimpleNamespace(name="ours", command="pascal"), SimpleNamespace(base_url="")
    timed.run_once(arm, plan.rates[0], 0, server, None)
    assert list(timed.costs) == known


def test_an_arm_is_not_begun_without_time_for_it(tmp_path):
    plan = load_plan(check.HERE / "cpu-one.toml")
    timed = check.Timed(plan, tmp_path / "one.json", deadline=0.0, least_s=40.0)
    with pytest.raises(ArmError, match="not run: 0 s left"):
        timed.run_arm(plan.arms[0], 0, tmp_path, "")
