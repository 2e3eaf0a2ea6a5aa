"""The frozen configuration: round trips, and every bad value is one clear line."""

import argparse
import dataclasses
import math
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pascal_sglang.config import (
    CONFIG_ENV,
    ConfigError,
    LaunchError,
    PascalConfig,
    add_flags,
    from_flags,
)
from pascal_sglang.entrypoints.preflight import check_machine, open_to_others
from pascal_sglang.launch_server import main, parse


def test_survives_the_trip_to_a_child_process():
    config = PascalConfig(assume_reasoning=True, default_thinking_budget=7)
    assert PascalConfig.from_env({CONFIG_ENV: config.to_json()}) == config


def test_absent_means_not_asked_for():
    assert PascalConfig.from_env({}) is None
    assert PascalConfig.from_env({CONFIG_ENV: ""}) is None


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PascalConfig().policy = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", "not JSON"),
        ("[1]", "JSON object"),
        ('{"polcy": "fcfs"}', "polcy"),
        ('{"policy": "best"}', "best"),
        ('{"policy": 3}', "policy"),
        ('{"assume_reasoning": "yes"}', "assume_reasoning"),
        *(
            (f'{{"kv_transport": "mooncake", "kv_listen": {bad}}}', "kv_listen must be an IPv4")
            for bad in (
                '"0.0.0.0"',
                '"255.255.255.255"',
                '"224.0.0.1"',
                '"::1"',
                '"0.0.0.0/0"',
                '"0.0.0.0/8"',
                '"10.0.0.1/24"',
                '"10.0.0.0/33"',
                '"::/64"',
                '"*"',
                '"eth0 eth1"',
                '"a_name_that_is_too_long"',
                '""',
            )
        ),
        ('{"kv_listen": 5}', "kv_listen must be a text, not 5"),
        ('{"kv_listen": "127.0.0.1"}', "auto listens nowhere"),
        ('{"qoe_slo": 2}', "qoe_slo must be a number above 0 and of at most 1"),
        ('{"answer_tpot_ms": 0}', "answer_tpot_ms must be a number above 0"),
        ('{"answer_tpot_ms": NaN}', "answer_tpot_ms must be a number above 0"),
        ('{"host_kv_gb": "3"}', "host_kv_gb must be a number of at least 0"),
        ('{"quantum_tokens": 0}', "quantum_tokens must be a whole number of at least 1"),
        ('{"answer_bias": 0}', "answer_bias must be a number above 0"),
        ('{"migration": "on"}', "migration must be one of adaptive, always, drain, off"),
        ('{"max_ttfo": 0}', "max_ttfo must be a number above 0"),
        ('{"effort_budgets": 3}', "effort_budgets must be a text, not 3"),
        ('{"brownout": "P50"}', "brownout must be one of P75, P90, off"),
        *(
            (f'{{"effort_budgets": {bad}}}', "effort_budgets must be EFFORT=TOKENS")
            for bad in (
                '""',
                '"low"',
                '"low=-1"',
                '"low=1,low=2"',
                '"=3"',
                '"a b=3"',
                '"low=1.5"',
            )
        ),
        ('{"default_thinking_budget": -1}', "default_thinking_budget"),
        ('{"default_thinking_budget": true}', "default_thinking_budget"),
        ('{"default_thinking_budget": 1.5}', "default_thinking_budget"),
    ],
)
def test_bad_values_name_the_culprit_on_one_line(text, says):
    with pytest.raises(ConfigError) as caught:
        PascalConfig.from_json(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


CHANGEABLE = {
    "quantum_tokens": 7,
    "demote_tokens": 70,
    "demote_on": "thinking",
    "answer_bias": 0.5,
    "answer_tpot_ms": 20,
    "qoe_slo": 0.9,
    "pace_stream": True,
    "log_decisions": True,
    "assume_reasoning": True,
    "fairness": "header:X-Tenant",
    "max_ttfo": 3,
    "brownout": "P90",
    "effort_budgets": "low=5",
}


def test_what_may_change_while_serving_is_marked_once_and_changes():
    config = PascalConfig()
    assert set(config.changeable()) == set(CHANGEABLE)
    changed = config.changed(CHANGEABLE)
    assert changed == PascalConfig(**CHANGEABLE)
    assert changed.changeable() == CHANGEABLE
    assert type(changed.answer_tpot_ms) is float, "as the flag makes it"
    assert changed.changed({"max_ttfo": None, "effort_budgets": None}).max_ttfo is None
    assert config == PascalConfig()
    parser = argparse.ArgumentParser()
    add_flags(parser)
    marked = {a.dest.removeprefix("pascal_") for a in parser._actions if "[may" in str(a.help)}
    assert marked == set(CHANGEABLE)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"quantum": 7}, "the configuration has no 'quantum'"),
        ({"quantum_tokens": 7, "no": 1, "such": 2}, "the configuration has no 'no', 'such'"),
        ({"policy": "rr"}, "policy cannot change while the server runs"),
        ({"quantum_tokens": 7, "host_kv_gb": 1}, "host_kv_gb cannot change"),
        ({"chaos": 0.5}, "chaos cannot change"),
        ({"quantum_tokens": 0}, "quantum_tokens must be a whole number of at least 1"),
        ({"quantum_tokens": 10**400}, "quantum_tokens must be a whole number of at least 1"),
        ({"quantum_tokens": None}, "quantum_tokens must be a whole number"),
        ({"quantum_tokens": 7.5}, "quantum_tokens must be a whole number"),
        ({"answer_tpot_ms": 10**400}, "answer_tpot_ms must be a number above 0"),
        ({"answer_tpot_ms": math.inf}, "answer_tpot_ms must be a number above 0"),
        ({"answer_tpot_ms": "20"}, "answer_tpot_ms must be a number above 0"),
        ({"pace_stream": 1}, "pace_stream must be true or false"),
        ({"demote_on": ["kv"]}, "demote_on must be one of kv, thinking"),
        *(
            ({"fairness": bad}, "fairness must be off, api-key, user or header:NAME")
            for bad in ("on", "header:", "header:a b", "header:" + "x" * 65, "User")
        ),
        *(({"fairness": bad}, "fairness must be a text") for bad in (None, 3, [])),
    ],
)
def test_a_bad_change_is_one_line_and_changes_nothing(values, says):
    """A flag of that value says the same."""
    config = PascalConfig()
    with pytest.raises(ConfigError) as caught:
        config.changed(values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert config == PascalConfig()


def test_fairness_wants_a_policy_that_schedules():
    assert PascalConfig(policy="rr", fairness="user").fairness == "user"
    with pytest.raises(ConfigError, match="fairness is for a policy that schedules, not for fcfs"):
        PascalConfig(policy="fcfs", fairness="user")


@pytest.mark.parametrize(
    ("custom_params", "pace"),
    [
        ({"pascal": {"answer_tpot_ms": 30}}, 30.0),
        ({"pascal": {"answer_tpot_ms": 1.5}}, 1.5),
        *(({"pascal": {"answer_tpot_ms": low}}, 1.0) for low in (0.5, 0, -1, -math.inf)),
        *(({"pascal": {"answer_tpot_ms": high}}, 10_000.0) for high in (10_001, math.inf, 10**400)),
        *(({"pascal": {"answer_tpot_ms": bad}}, 100.0) for bad in (True, "9", None, math.nan)),
        *((bad, 100.0) for bad in (None, {}, {"pascal": None}, {"pascal": {}}, [1], "x")),
    ],
)
def test_a_request_may_bring_its_own_pace(custom_params, pace):
    assert PascalConfig(answer_tpot_ms=100.0).answer_tpot_ms_of(custom_params) == pace


def test_efforts_have_the_budgets_that_were_given():
    config = PascalConfig(effort_budgets="low=0, high=8192")
    assert [config.budget_of_effort(e) for e in ("low", "high", "medium", "")] == [
        0,
        8192,
        None,
        None,
    ]
    assert PascalConfig().budget_of_effort("low") is None


def test_the_banner_is_one_line_with_policy_and_every_value():
    banner = PascalConfig().banner()
    assert "\n" not in banner
    assert "policy=" in banner
    for field in dataclasses.fields(PascalConfig):
        assert f"{field.name}=" in banner


def test_flags_are_split_from_sglangs():
    options, rest = parse(["--model-path", "m", "--pascal-policy", "fcfs", "--tp-size", "2"])
    assert options.pascal_policy == "fcfs"
    assert rest == ["--model-path", "m", "--tp-size", "2"]


def test_every_flag_becomes_its_field():
    options, _ = parse(["--model-path", "m", "--no-pascal-live-migration", "--pascal-gpus", "2"])
    assert from_flags(options) == PascalConfig(live_migration=False, gpus=2)


def test_unknown_pascal_flags_do_not_reach_sglang():
    with pytest.raises(LaunchError, match="--pascal-polcy"):
        parse(["--pascal-polcy=fcfs"])


def test_bad_flag_value_is_one_line_and_exit_code_2(capsys):
    assert main(["--pascal-policy", "best"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "best" in captured.err


@pytest.mark.parametrize(
    ("umask", "warns"), [(0o022, False), (0o077, False), (0o002, True), (0, True), (0o020, True)]
)
def test_a_umask_that_opens_sglangs_sockets_is_named(umask, warns):
    before = os.umask(umask)
    try:
        warning = open_to_others()
        assert os.umask(before) == umask, "it stays what it was"
    finally:
        os.umask(before)
    assert (f"umask {umask:04o} lets other users" in (warning or "")) == warns


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("", 1),
        ("--tp 2", 2),
        ("--tp-size 2 --dp-size 2", 4),
        ("--pp-size 2", 2),
        ("--pipeline-parallel-size 2 --tp 2 --dp 2", 8),
        ("--tp 4 --dp 4 --enable-dp-attention", 4),
    ],
)
def test_all_ranks_share_the_cores(monkeypatch, flags, ranks):
    made: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", made)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    check_machine(["--device", "cpu", *flags.split()])
    assert made["OMP_NUM_THREADS"] == str(max(1, 7 // ranks)), "one core for other processes"
    binding = "|".join(str(core) for core in range(ranks)) if ranks > 1 else None
    assert made.get("SGLANG_CPU_OMP_THREADS_BIND") == binding


def test_a_stream_that_a_program_reads_is_not_paced():
    config = PascalConfig(answer_tpot_ms=50.0)
    own = {"custom_params": {"pascal": {"answer_tpot_ms": 30}}}
    assert config.stream_tpot_ms_of({}) == 50.0
    assert config.stream_tpot_ms_of(own) == 30.0
    assert config.stream_tpot_ms_of({**own, "json_schema": "{}"}) == 30.0, "it names a pace"
    assert config.stream_tpot_ms_of({"json_schema": "{}"}) == 0.0


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=80)
    | st.sampled_from([10**400, -(10**400), "low=" + "9" * 5000, "low=1,low=2", "header:\ud800"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)


@given(name=st.sampled_from(sorted(PascalConfig().changeable())), value=JSON_VALUES)
@example(name="max_ttfo", value=10**400)
@example(name="effort_budgets", value=[])
@example(name="effort_budgets", value="low=" + "9" * 5000)
@example(name="fairness", value={})
def test_whatever_a_field_is_set_to_it_is_taken_whole_or_refused_in_one_line(name, value):
    try:
        changed = PascalConfig().changed({name: value})
    except ConfigError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said.encode()) < 400
    else:
        assert PascalConfig.from_json(changed.to_json()) == changed
