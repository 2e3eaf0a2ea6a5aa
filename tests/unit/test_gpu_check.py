"""The GPU check's judgement, its figures, its plans, and the order in which it does things."""

import json
import threading
from types import SimpleNamespace

import pytest

from evals import arms
from evals.arms import Arm, load_plan
from evals.gpu import check, device, figures, identity, kernels, kit, moves
from evals.gpu.identity import Reply
from evals.gpu.servers import Servers, key_of
from evals.load.server import ArmError
from pascal_sglang.config import PascalConfig
from pascal_sglang.demo.dummy import ARCHITECTURES

BEFORE = {
    "pauses": {"host": 1, "resident": 1, "recompute": 0, "host_tokens": 300},
    "migrations": {"outgoing": {"moved": 1}, "blocked_s": [0.5], "bytes": 0},
    "policy_errors": 0,
    "kv_tokens": {"capacity": 100, "free": 60, "evictable": 40, "host": 0},
    "costs": {"copy_s": 1e-4, "copy_token_s": 1e-6, "prefill_token_s": 2e-5},
}
AT_REST = BEFORE | {
    "pauses": {"host": 3, "resident": 2, "recompute": 1, "host_tokens": 900},
    "migrations": {
        "outgoing": {"moved": 3, "kept:timeout": 1},
        "blocked_s": [0.5, 0.02, 0.04],
        "bytes": 4 * 2**20,
    },
}
EXPECTED = [Reply([1, 2], "length"), Reply([3], "stop"), Reply(None, "abort")]
PARTS = ["probe", "identity", "prefixes", "order", "overhead", "moves"]


def found(seen=EXPECTED, again=EXPECTED, **changes):
    rest = [AT_REST | changes] * 2
    return identity.compare(EXPECTED, seen, again, [BEFORE] * 2, rest)


def test_identity_holds_when_pauses_moves_and_aborts_changed_nothing():
    seen = found()
    assert seen.holds
    assert seen.pauses == {"resident": 2, "host": 4, "recompute": 2}
    assert seen.migrations == {"kept:timeout": 2, "moved": 4}
    assert (seen.requests, seen.tokens, seen.stopped, seen.aborted) == (3, 3, 1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"policy_errors": 1},
        {"kv_tokens": AT_REST["kv_tokens"] | {"free": 59}},
        {"kv_tokens": AT_REST["kv_tokens"] | {"host": 1}},
        {"migrations": {"outgoing": {"moved": 1, "kept:timeout": 9}}},
        *({"pauses": AT_REST["pauses"] | {tier: 0}} for tier in identity.TIERS),
    ],
)
def test_identity_does_not_hold_if_something_went_wrong_or_never_happened(changes):
    changes = dict(changes)
    if "pauses" in changes:  # As many as before, that is.
        tier = next(t for t in identity.TIERS if not changes["pauses"][t])
        changes["pauses"] = changes["pauses"] | {tier: BEFORE["pauses"][tier]}
    assert not found(**changes).holds


@pytest.mark.parametrize(
    ("seen", "different"),
    [
        ([Reply([1, 9], "length"), *EXPECTED[1:]], [0]),
        # Nobody was aborted; nobody stopped early.
        ([*EXPECTED[:2], Reply([7], "length")], []),
        ([EXPECTED[0], Reply([3], "length"), EXPECTED[2]], []),
    ],
)
def test_identity_does_not_hold_for_other_tokens_or_without_early_ends(seen, different):
    told = found(seen)
    assert told.different == different
    assert not told.holds


def test_what_differs_without_us_is_told_and_excuses_nothing():
    other = [Reply([1, 9], "length"), *EXPECTED[1:]]
    told = found(other, other)
    assert (told.different, told.unsteady) == ([0], [0])
    assert not told.holds
    assert found(again=other).holds
    assert any("SGLang alone" in line for line in figures.identity_lines(told))


def test_a_third_may_stop_early_some_are_aborted_and_some_share_a_beginning():
    apart = identity.bodies(36, "processor", shared=False)
    shared = identity.bodies(36, "processor", shared=True)
    made = [body["sampling_params"] for body in apart]
    assert sum("stop_token_ids" in params for params in made) == 12
    assert all(params["ignore_eos"] == ("stop_token_ids" not in params) for params in made)
    assert sum(body["stream"] for body in apart) == 3
    assert not any(b["stream"] and "stop_token_ids" in b["sampling_params"] for b in apart)
    assert sum(body["text"].startswith("a beginning") for body in shared) == 27
    assert not any(body["text"].startswith("a beginning") for body in apart)
    assert len({body["rid"] for body in apart}) == 36


def test_events_of_a_stream_are_told_apart():
    lines = [b'data: {"a": 1}\n', b"\n", b'data: {"a": 2}\n', b"\n", b"data: [DONE]\n"]
    assert list(identity._events(lines)) == [{"a": 1}, {"a": 2}]


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


def test_steps_are_compared_with_the_first_arm():
    def run(arm, tpot):
        return SimpleNamespace(arm=arm, summary={"mean_tpot_ms": tpot, "output_throughput": None})

    told = figures.steps([run("fcfs", 10.0), run("pascal", 11.0), run("fcfs", 12.0)])
    assert told["fcfs"] == {"mean_tpot_ms": 11.0, "output_throughput": None}
    lines = figures.step_lines(told)
    assert lines[1].endswith("11, 1.000 x")
    assert [line[-1] for line in lines if "throughput" in line] == ["-", "-"]
    assert figures.step_lines({}) == []


def test_moves_are_those_of_one_run():
    row = moves.row_of(300, [BEFORE] * 2, [AT_REST] * 2, [0.01, 0.03])
    assert (row.moves, row.others) == (4, {"kept:timeout": 2})
    assert row.mib == pytest.approx(2)
    assert row.blocked_ms == (pytest.approx(30), pytest.approx(40))
    assert row.steps == pytest.approx(1.5)
    assert figures.moves_line(row).split()[:3] == ["300", "4", "2.0"]
    assert "2 kept:timeout" in figures.moves_line(row)
    nobody = moves.row_of(300, [BEFORE], [BEFORE], [])
    assert (nobody.moves, nobody.blocked_ms, nobody.steps) == (0, (0.0, 0.0), 0.0)


def test_a_line_of_the_probe_is_told_from_others():
    told = {"name": "x", "holds": False, "value": "why"}
    assert figures.probe_line(json.dumps(told)) == told
    assert [figures.probe_line(line) for line in ("Warning: {", "3", '{"name": 1}')] == [None] * 3
    assert figures.probe_text(told).endswith("DOES NOT HOLD, why")
    assert figures.probe_text({"name": "x", "holds": True, "value": None}).endswith("holds")
    assert figures.probe_text({"name": "x", "holds": None, "value": 2.0}).endswith(" 2")


def each_plan():
    for kind in check.KINDS:
        for name in PARTS[1:]:
            yield pytest.param(kind, name, id=f"{kind}-{name}")


@pytest.fixture
def a_check(tmp_path):
    """A check of a kind of device, without one."""
    return lambda kind, seconds=600.0, only=(): check.Check(kind, tmp_path, seconds, only)


@pytest.fixture
def without_models(monkeypatch, tmp_path):
    monkeypatch.setattr(arms, "model_folder", lambda *_: tmp_path)
    monkeypatch.setattr(arms, "logit_processor", lambda _: "")


@pytest.mark.parametrize(("kind", "name"), each_plan())
def test_every_plan_can_be_read(a_check, kind, name):
    plan = a_check(kind).plan(name)
    assert plan.model in {arms.TINY, arms.TINY_WIDE, *ARCHITECTURES}
    assert ("cpu" in plan.flags) == (kind == "cpu")
    assert len(plan.rates) == 1
    # Places are filled in, and what is JSON stays JSON.
    for arm in plan.arms:
        line = arms.command_line(arm, plan, check.HERE)
        assert not any("{model}" in word for word in line)
        if kind == "cuda":
            graphs = json.loads(line[line.index("--cuda-graph-config") + 1])
            assert graphs == {"prefill": {"backend": "disabled"}}


@pytest.mark.parametrize(("kind", "name"), each_plan())
def test_sglang_and_we_know_every_flag_of_a_plan(a_check, kind, name):
    from sglang.srt.server_args import ServerArgs

    from pascal_sglang.entrypoints.preflight import OneLineParser
    from pascal_sglang.launch_server import parse

    plan = a_check(kind).plan(name)
    parser = OneLineParser()
    ServerArgs.add_cli_args(parser)
    for arm in plan.arms:
        _, rest = parse(arms.command_line(arm, plan, check.HERE)[3:])
        assert parser.parse_args(rest).max_total_tokens == plan.kv_tokens


def test_servers_from_the_kit_get_what_they_need(tmp_path):
    env = kit.contents().environment
    assert env["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] == "python"
    for part in check.Check("cuda", tmp_path, 600.0, env=env).parts[1:]:
        for arm in part.servers:
            assert env.items() <= arms.command_env(arm, part.plan).items()


def test_parts_come_in_the_order_of_what_they_prove(a_check):
    for kind in check.KINDS:
        assert [part.name for part in a_check(kind).parts] == PARTS
        assert set(check.KINDS[kind].least_s) == set(PARTS)
    some = a_check("cpu", only=["moves", "probe"]).parts
    assert [part.name for part in some] == ["probe", "moves"]


@pytest.mark.parametrize("made", [identity.forced, moves.moving])
def test_our_configuration_is_one_that_a_server_takes(a_check, made):
    for kind in check.KINDS:
        arm = made(a_check(kind).plan("moves"))
        config = PascalConfig.from_json(arm.env["PASCAL_SGLANG_CONFIG"])
        assert config.moves_at_boundary
        assert config.gpus == 1
        assert ("SGLANG_PLATFORM" in arm.env) == (kind == "cpu")


def test_on_a_cpu_servers_are_shared(a_check, without_models):
    """Four serve five parts: cold ones take most of the time there."""
    made = a_check("cpu")
    keys = {part.name: set(made._keys(part)) for part in made.parts}
    assert len(set().union(*keys.values())) == 4
    assert keys["identity"] == keys["prefixes"]
    assert keys["order"] == keys["overhead"]
    assert len(keys["identity"] & keys["order"]) == 1


class FakeServer:
    """up: when it answers. dies: that it never does."""

    def __init__(self, dies=False):
        self.dies, self.stopped, self.waited_s = dies, threading.Event(), None

    def wait_ready(self, timeout_s):
        self.waited_s = timeout_s
        if self.dies:
            raise ArmError("server ended at start")

    def stop(self):
        self.stopped.set()


@pytest.fixture
def started(monkeypatch):
    """Servers by the name of their arm, in the order in which they were begun."""
    begun = {}

    def serve(arm, plan, model, *, forked):
        assert forked, "on a CPU"
        begun[arm.name] = FakeServer(dies=arm.name == "broken")
        return begun[arm.name]

    monkeypatch.setattr(arms, "serve", serve)
    return begun


def test_a_server_is_begun_once_and_ended_when_nobody_wants_it(started, tmp_path):
    plan = load_plan(check.HERE / "cpu-order.toml")
    fcfs, pascal = plan.arms
    with Servers() as servers:
        for arm in (fcfs, pascal, fcfs):
            servers.begin(arm, plan, tmp_path)
        assert list(started) == ["fcfs", "pascal"]
        first = servers.wait(key_of(fcfs, plan, tmp_path))
        assert first is started["fcfs"]
        assert 0 < first.waited_s <= plan.start_timeout_s
        servers.end_all_but({key_of(fcfs, plan, tmp_path)})
        servers.settle()
        assert started["pascal"].stopped.is_set()
        assert not first.stopped.is_set()
        assert key_of(pascal, plan, tmp_path) not in servers
    assert first.stopped.is_set()


@pytest.mark.parametrize("forked", [True, False])
def test_processes_of_a_server_on_a_cpu_are_forks_of_one(monkeypatch, tmp_path, forked):
    plan = load_plan(check.HERE / "cpu-order.toml")
    commands = []
    monkeypatch.setattr(arms, "Server", lambda name, command, *_: commands.append(command))
    for arm in plan.arms:
        arms.serve(arm, plan, tmp_path, forked=forked)
    before = ["-m", "pascal_sglang.demo.forked"] if forked else ["-m"]
    modules = ["sglang.launch_server", "pascal_sglang.launch_server"]
    assert [c[1 : len(before) + 2] for c in commands] == [[*before, name] for name in modules]


def test_a_server_that_does_not_start_is_told_to_all_that_want_it(started, tmp_path):
    plan = load_plan(check.HERE / "cpu-order.toml")
    broken = Arm(name="broken", command="stock", role="stock")
    with Servers() as servers:
        servers.begin(broken, plan, tmp_path)
        servers.settle()
        for _ in range(2):
            with pytest.raises(ArmError, match="ended at start"):
                servers.wait(key_of(broken, plan, tmp_path))
        assert started["broken"].stopped.is_set()


@pytest.mark.parametrize(
    ("gib", "begun"),
    [
        (0.0, ["stock", "forced"]),
        (20.0, ["stock", "forced", "pascal", "moving"]),
        (12.0, ["stock", "forced", "pascal"]),
    ],
)
def test_servers_of_later_parts_start_while_memory_lasts(
    a_check, started, without_models, monkeypatch, gib, begun
):
    """Those of `identity` wait for nothing; `fcfs` is its `stock` under another name."""
    monkeypatch.setattr(device, "memory_gib", lambda _: gib)
    made = a_check("cpu")
    made._begin(made.parts[1:])
    assert list(started) == begun


def test_what_is_timed_waits_for_its_own_servers_alone(
    a_check, started, without_models, monkeypatch
):
    monkeypatch.setattr(device, "memory_gib", lambda _: 1000.0)
    made = a_check("cpu")
    made._begin(made.parts[3:])
    assert list(started) == ["fcfs", "pascal"]


def ran(made, results):
    """Runs the check with parts that do nothing but what `results` says of them."""

    def run(name):
        result = results.get(name, {})
        if isinstance(result, Exception):
            raise result
        return result

    made.parts = [
        check.Part(part.name, lambda name=part.name: run(name), timed=part.timed)
        for part in made.parts
    ]
    made.of = check.KINDS["cpu"]
    return made.run()


def test_a_part_that_fails_keeps_none_of_the_others_from_running(a_check, tmp_path, capsys):
    made = a_check("cpu")
    assert not ran(made, {"identity": check.PartError("see its figures"), "moves": {"rows": []}})
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["failed"] == ["identity: see its figures"]
    assert list(told["parts"]) == PARTS
    assert told["parts"]["moves"]["rows"] == []
    assert "FAILED: identity: see its figures" in (tmp_path / "check.txt").read_text()
    assert "FAILED: identity" in capsys.readouterr().out
    assert ran(a_check("cpu"), {})


def test_time_is_cut_from_the_end(a_check, tmp_path):
    """Twenty-five seconds are enough for the probe and for the short parts, whenever they come."""
    made = a_check("cpu", seconds=25.0)
    assert not ran(made, {})
    left_out = [text.partition(":")[0] for text in made.failed]
    assert left_out == ["identity", "prefixes", "order"]
    assert all("not run" in text for text in made.failed)
    made = a_check("cpu", seconds=0.001)
    ran(made, {})
    assert [text.partition(":")[0] for text in made.failed] == PARTS


def test_results_are_there_while_the_check_still_runs(a_check, tmp_path):
    made = a_check("cpu")

    def second():
        told = json.loads((tmp_path / "check.json").read_text())
        return {"before": list(told["parts"]), "text": (tmp_path / "check.txt").read_text()}

    made.parts = [check.Part("probe", lambda: {"x": 1}), check.Part("moves", second)]
    assert made.run()
    seen = made.results["moves"]
    assert seen["before"] == ["probe"]
    assert "\nmoves, after" in seen["text"]


@pytest.mark.parametrize(("costs", "known"), [(AT_REST["costs"], ["ours"]), ({}, [])])
def test_an_order_that_measures_no_costs_has_none(monkeypatch, tmp_path, costs, known):
    plan = load_plan(check.HERE / "cpu-order.toml")
    timed = check.Timed(plan, tmp_path / "order.json", deadline=1e12, least_s=40.0)
    monkeypatch.setattr(check.Comparison, "run_once", lambda *_: None)
    monkeypatch.setattr(check.remote, "instances", lambda url: [AT_REST | {"costs": costs}] * 2)
    arm, server = SimpleNamespace(name="ours", command="pascal"), SimpleNamespace(base_url="")
    target = check.Target(base_url="", logit_processor="")
    timed.run_once(arm, plan.rates[0], 0, server, target)
    assert list(timed.costs) == known


def test_a_run_is_not_begun_without_time_for_it(tmp_path):
    plan = load_plan(check.HERE / "cpu-order.toml")
    timed = check.Timed(plan, tmp_path / "order.json", deadline=0.0, least_s=40.0)
    with pytest.raises(ArmError, match="seed 0 not run: 0 s left"):
        timed.run_once(plan.arms[0], plan.rates[0], 0, None, None)


def test_kernels_are_built_side_by_side_and_one_that_fails_is_told(capsys):
    both = threading.Barrier(2, timeout=30)

    def fails():
        both.wait()
        raise OSError("no nvcc")

    assert kernels.build({"one": both.wait, "two": fails}) == ["two"]
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("s  ")[1] for line in lines) == ["one", "two: OSError: no nvcc"]


def test_a_gpu_tells_its_free_memory(monkeypatch):
    monkeypatch.setattr(device, "_ask", lambda query: "81920" if query is device.FREE else None)
    assert device.memory_gib("cuda") == 80.0
    monkeypatch.setattr(device, "_ask", lambda query: None)
    assert device.memory_gib("cuda") == 0.0
    assert device.memory_gib("cpu") > 0
