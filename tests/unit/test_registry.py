"""Policies by name: those of the package, and a record from anywhere on the Python path."""

import pytest

from examples.feedback_queue import POLICY
from pascal_sglang.config import ConfigError, PascalConfig
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import Capacity, Planner
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import POLICIES, UnknownPolicy, find
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.sim.__main__ import main as simulate
from pascal_sglang.sim.arms import ARMS, arm_of

NAME = "examples.feedback_queue:POLICY"


def test_names_lead_to_records():
    assert find("pascal") is POLICIES["pascal"]
    assert find(NAME) is POLICY
    assert PascalConfig(policy=NAME).record is POLICY
    assert PascalConfig.from_json(PascalConfig(policy=NAME).to_json()).record is POLICY


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pascall", "must be one of pascal, paper"),
        ("nosuch:POLICY", "No module named 'nosuch'"),
        ("examples.feedback_queue:nothing", "has no attribute 'nothing'"),
        ("examples.feedback_queue:rank", "is no pascal_sglang.policy.registry.Policy"),
        ("examples.feedback_queue:", "no attribute"),
        (":POLICY", "Empty module name"),
        ("..:POLICY", "policy ..:POLICY"),
        (3, "must be a name"),
    ],
)
def test_a_name_that_leads_nowhere_ends_in_one_line(name, why):
    with pytest.raises(UnknownPolicy, match=why) as seen:
        find(name)
    assert "\n" not in str(seen.value)
    with pytest.raises(ConfigError, match=why):
        PascalConfig(policy=name)


@pytest.mark.parametrize(
    ("policy", "places", "migrates", "schedules"),
    [
        ("pascal", True, False, True),
        ("paper", True, True, True),
        ("rr", False, False, True),
        ("fcfs", False, False, False),
        (NAME, True, False, True),
    ],
)
def test_what_a_server_does_follows_from_the_record(policy, places, migrates, schedules):
    config = PascalConfig(policy=policy)
    assert (config.places, config.can_migrate, config.paces) == (places, migrates, schedules)


def test_whether_requests_move_may_be_asked_for():
    """By an operator, whatever the record says; tests force it; without placement none moves."""

    def can_migrate(policy, **asked):
        return PascalConfig(policy=policy, **asked).can_migrate

    assert can_migrate("pascal", migration="adaptive")
    assert can_migrate(NAME, migration="always")
    assert not can_migrate("paper", migration="off")
    assert can_migrate("pascal", force_migration=0.01)
    assert not can_migrate("rr", migration="adaptive")
    assert not can_migrate("pascal", migration="adaptive", placement="sglang")
    assert "migration=adaptive" in PascalConfig(policy="paper").banner()
    assert "migration=off" in PascalConfig().banner()


def test_the_planner_goes_by_the_record():
    """One slot: the request that has produced more gives way to one of an upper level."""
    planner, now = Planner(POLICY, Tuning(quantum=10)), PassInfo(100, 1.0, 0.01)
    old = RequestState(0, Pacer(0.1), status=RequestStatus.RUNNING, total_tokens=25, kv_tokens=30)
    new = RequestState(1, Pacer(0.1), kv_tokens=5)
    planner.queue.stopped(new, RequestStatus.WAITING, now)
    plan = planner.plan([old], Capacity(1000, 0, 0), now)
    assert (plan.start, plan.pause) == ((new,), (old,))
    old.total_tokens = 5
    assert planner.plan([old], Capacity(1000, 0, 0), now).pause == ()


def test_the_simulator_runs_it(capsys):
    asked = ["run", "arena-hard", "--requests", "60", "--instances", "2", "--seeds", "1"]
    assert simulate([*asked, "--load", "1.5", "--arms", f"rr,{NAME}", "--processes", "1"]) == 0
    assert NAME in capsys.readouterr().out


def test_arms_do_around_a_policy_what_servers_do():
    assert arm_of("paper") is ARMS["paper"]
    arm = arm_of(NAME)
    assert (arm.record, arm.lazy, arm.predict, arm.migration) == (POLICY, True, True, "off")
    assert arm_of("examples.feedback_queue:POLICY").on_pace


def test_an_arm_may_change_numbers_of_its_policy():
    name = "pascal@settle=1500+ageing=8"
    assert arm_of(name) == ARMS["pascal"].but(name, tuning=(("settle", 1500.0), ("ageing", 8)))
    assert arm_of(f"{NAME}@ageing=8").tuning == (("ageing", 8),)
    for bad in ("ageing=8.5", "ageing", "", "demote_on=kv", "x=1", "settle=1500+"):
        with pytest.raises(UnknownPolicy, match="FIELD=NUMBER"):
            arm_of(f"pascal@{bad}")
