"""The simulator: jumping decides as stepping does, nothing is lost, and every arm ends its work."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.policy import victims
from pascal_sglang.policy.placement import Placement
from pascal_sglang.sim import controller
from pascal_sglang.sim.arms import ARMS
from pascal_sglang.sim.clock import Clock
from pascal_sglang.sim.cluster import Setup, simulate
from pascal_sglang.sim.experiments import ablations, paper
from pascal_sglang.sim.experiments.runs import run_all
from pascal_sglang.sim.figures import alone, figures
from pascal_sglang.sim.hardware import PRESETS
from pascal_sglang.sim.loads.lengths import PRESETS as LENGTHS
from pascal_sglang.sim.outcome import Outcome
from pascal_sglang.sim.passes import Passes
from pascal_sglang.sim.tenants import fair_shares, jain
from pascal_sglang.sim.workload import Shape, Workload, draw, from_rows, mean_lengths

SMALL = dataclasses.replace(PRESETS["r1-qwen-32b-h100"], capacity=20000, host=60000)


def load(source, requests, share, seed, instances=2, cost=SMALL):
    return draw(source, requests, cost.rate(*mean_lengths(source)) * instances * share, seed)


@pytest.mark.parametrize(
    ("source", "requests", "seed", "beside"),
    [("arena-hard", 70, 3, False), ("reasoning-heavy", 40, 0, True)],
    ids=["blocking", "beside"],
)
@pytest.mark.parametrize("name", ARMS)
def test_jumping_decides_as_stepping_does(name, source, requests, seed, beside, monkeypatch):
    # A ranking kept for several passes depends on which pass made it.
    monkeypatch.setattr(victims, "KEEP_PASSES", 0)
    work = load(source, requests, 1.3, seed)
    cost = dataclasses.replace(SMALL, copies_beside=beside)
    jumped, stepped = (
        simulate(Setup(cost=cost, instances=2, step_by_step=steps), ARMS[name], work)
        for steps in (False, True)
    )
    for column in ("first_token", "reasoning_end", "first_answer", "finished", "qoe"):
        assert getattr(jumped, column) == pytest.approx(getattr(stepped, column), abs=1e-6), column
    assert (jumped.pauses == stepped.pauses).all()
    assert (jumped.instance == stepped.instance).all()
    assert stepped.events > 3 * jumped.events


@pytest.mark.parametrize("name", ["pascal", "rr-restart", "paper"])
def test_jumping_decides_as_stepping_does_by_priority_too(name, monkeypatch):
    monkeypatch.setattr(victims, "KEEP_PASSES", 0)
    rate = SMALL.rate(*mean_lengths("arena-hard")) * 2 * 1.6
    work = draw("arena-hard", 70, rate, 1, Shape(interactive=0.3))
    jumped, stepped = (
        simulate(Setup(cost=SMALL, instances=2, step_by_step=steps), ARMS[name], work)
        for steps in (False, True)
    )
    assert jumped.finished == pytest.approx(stepped.finished, abs=1e-6)
    assert (jumped.pauses == stepped.pauses).all()


def tenants_load(requests, share, seed):
    rate = SMALL.rate(*mean_lengths("arena-hard")) * 2 * share
    return draw("arena-hard", requests, rate, seed, Shape(tenants=(10, 1, 1)))


def test_jumping_decides_as_stepping_does_with_tenants_too(monkeypatch):
    monkeypatch.setattr(victims, "KEEP_PASSES", 0)
    work = tenants_load(90, 1.8, 1)
    jumped, stepped, plain = (
        simulate(Setup(cost=SMALL, instances=2, step_by_step=steps), ARMS[name], work)
        for steps, name in ((False, "pascal-fair"), (True, "pascal-fair"), (False, "pascal"))
    )
    assert jumped.finished == pytest.approx(stepped.finished, abs=1e-6)
    assert (jumped.pauses == stepped.pauses).all()
    assert stepped.events > 3 * jumped.events
    assert (jumped.finished != plain.finished).any()


def test_a_light_tenant_answers_sooner_with_fairness_and_without_tenants_nothing_changes():
    work = tenants_load(300, 2.0, 2)
    setup = Setup(cost=SMALL, instances=2)
    fair, plain = (
        figures(setup, work, simulate(setup, ARMS[name], work))
        for name in ("pascal-fair", "pascal")
    )
    assert sum(fair["requests_by_tenant"]) == 300
    for light in (1, 2):
        assert fair["ttfo_by_tenant"][light] < 0.7 * plain["ttfo_by_tenant"][light]
    assert fair["jain"] > plain["jain"] + 0.02
    alone = dataclasses.replace(work, tenant=[])
    one, other = (simulate(setup, ARMS[name], alone) for name in ("pascal-fair", "pascal"))
    assert (one.finished == other.finished).all()
    assert "jain" not in figures(setup, alone, one)


def test_fair_shares_and_jains_index_by_hand():
    assert fair_shares([10.0, 1.0, 4.0], 9.0) == [4.0, 1.0, 4.0]
    assert fair_shares([10.0, 1.0], 20.0) == [10.0, 1.0]
    assert fair_shares([5.0, 5.0], 4.0) == [2.0, 2.0]
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([0.0, 0.0]) == 1.0


def test_interactive_requests_answer_sooner_than_without_priorities():
    rate = SMALL.rate(*mean_lengths("arena-hard")) * 2 * 2.0
    work = draw("arena-hard", 300, rate, 2, Shape(interactive=0.3))
    with_them, without = (
        figures(setup, work, simulate(setup, ARMS[name], work))
        for setup in [Setup(cost=SMALL, instances=2)]
        for name in ("pascal", "pascal-no-priorities")
    )
    assert with_them["mean_ttfo_interactive"] < 0.8 * without["mean_ttfo_interactive"]
    assert with_them["mean_ttfo_batch"] > without["mean_ttfo_batch"]


@given(
    arm=st.sampled_from(sorted(ARMS)),
    seed=st.integers(0, 10**6),
    share=st.floats(0.5, 2.0),
    capacity=st.sampled_from([17000, 30000]),
    host=st.sampled_from([0, 3000, 10**6]),
    slots=st.sampled_from([6, 256]),
    known=st.booleans(),
    beside=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_under_any_load(arm, seed, share, capacity, host, slots, known, beside):
    # `simulate` itself balances requests, tokens and memory.
    cost = dataclasses.replace(
        SMALL, capacity=capacity, host=host, slots=slots, copies_beside=beside
    )
    work = load("alpacaeval", 60, share, seed, cost=cost)
    outcome = simulate(Setup(cost=cost, instances=2, knows_lengths=known), ARMS[arm], work)
    assert outcome.tokens == work.output_tokens
    assert not np.isnan(outcome.finished).any()
    assert outcome.most_held <= 1


@given(count=st.integers(1, 60), first=st.floats(1e-3, 0.1), growth=st.floats(0, 1e-4))
def test_passes_together_are_as_one_by_one(count, first, growth):
    together, single = Passes(), Passes()
    for passes in (together, single):
        passes.add(1, 20, 0.05)
    together.add(count, 8, first + growth * (count - 1), growth)
    for number in range(count):
        single.add(1, 8, first + growth * number)
    assert together.count == single.count
    assert together.mean_s == pytest.approx(single.mean_s)
    assert together.mean_batch == pytest.approx(single.mean_batch)


def test_the_same_seed_gives_the_same_run():
    work = load("alpacaeval", 120, 1.1, seed=5)
    first, second = (
        simulate(Setup(cost=SMALL, instances=2), ARMS["pascal"], work) for _ in range(2)
    )
    assert (first.finished == second.finished).all()
    assert first.events == second.events


def test_one_request_alone_by_hand():
    work = Workload([1.0], [100], [3], [2])
    outcome = simulate(Setup(cost=SMALL, instances=1), ARMS["pascal"], work)
    # Prefill gives the first of four reasoning tokens; step k reads 100 + k - 1 KV tokens.
    step = SMALL.step_s + SMALL.request_s
    reads = [step + SMALL.kv_token_s * kv for kv in range(100, 105)]
    first = 1.0 + SMALL.prefill_s + 100 * SMALL.prefill_token_s
    assert outcome.first_token[0] == pytest.approx(first)
    assert outcome.reasoning_end[0] == pytest.approx(first + sum(reads[:3]))
    assert outcome.first_answer[0] == pytest.approx(first + sum(reads[:4]))
    assert outcome.finished[0] == pytest.approx(first + sum(reads[:5]))
    assert alone(SMALL, work)[0] == pytest.approx(outcome.first_answer[0] - 1.0)


def test_with_memory_to_spare_every_arm_is_alike():
    cost = dataclasses.replace(SMALL, capacity=10**6)
    setup, work = Setup(cost=cost, instances=1), load("alpacaeval", 60, 0.5, seed=1, instances=1)
    one_instance = [
        figures(setup, work, simulate(setup, ARMS[name], work))
        for name in ("fcfs", "rr", "rr-restart", "paper", "pascal")
    ]
    assert {f["pauses"] for f in one_instance} == {0}
    assert len({round(f["mean_ttfo"], 9) for f in one_instance}) == 1


def test_order_matters_under_pressure():
    setup, work = Setup(cost=SMALL, instances=2), load("arena-hard", 150, 1.2, seed=2)
    slow = {
        name: figures(setup, work, simulate(setup, ARMS[name], work))["p99_slowdown"]
        for name in ("sglang", "fcfs", "pascal")
    }
    assert slow["pascal"] < slow["fcfs"] / 2 < slow["sglang"]


def test_a_request_that_fits_nowhere_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^request 0 needs 30004 tokens of KV"):
        simulate(Setup(cost=SMALL, instances=1), ARMS["pascal"], Workload([0], [30000], [1], [2]))


def test_stock_retracts_when_it_promised_too_much():
    work = load("reasoning-heavy", 100, 3.0, seed=1)
    outcome = simulate(Setup(cost=SMALL, instances=2), ARMS["sglang"], work)
    known = simulate(Setup(cost=SMALL, instances=2, knows_lengths=True), ARMS["sglang"], work)
    assert outcome.tiers["retracted"] > 0
    assert outcome.recomputed_tokens > 0
    # A known length is reserved whole, up to 4,096 tokens.
    assert known.tiers["retracted"] < outcome.tiers["retracted"]


def test_pauses_without_host_memory_are_recomputed():
    cost = dataclasses.replace(SMALL, host=0)
    outcome = simulate(Setup(cost=cost, instances=2), ARMS["rr"], load("arena-hard", 80, 1.5, 1))
    assert outcome.tiers["host"] == 0 < outcome.tiers["recompute"]
    assert outcome.recomputed_tokens > 0


def test_moves_that_ignore_the_override_are_never_refused():
    outcomes = [
        simulate(Setup(cost=SMALL, instances=2), ARMS[name], load("arena-hard", 150, 1.5, 2))
        for name in ("paper", "paper-non-adaptive")
    ]
    adaptive, always = outcomes
    assert adaptive.refused_migrations > 0
    assert always.refused_migrations == 0
    assert always.moved.sum() == always.decisions["fewest_there"] + always.decisions["none_on_pace"]


def test_a_status_does_not_reset_what_the_controller_counts_itself():
    views = controller.Controller(ARMS["paper"], Clock(), [None], quantum=500)
    view = views.views[0]
    view.migrations, view.arriving, view.reasoning = 3, 700, 5
    views._recall(view)
    assert (view.migrations, view.arriving, view.reasoning) == (3, 700, 0)


@pytest.mark.parametrize("status_s", [0.0, 0.02])
def test_the_end_of_thinking_counts_once(monkeypatch, status_s):
    """Whether the controller has just heard from the instance or not."""
    monkeypatch.setattr(controller, "STATUS_S", status_s)
    seen = []
    decide = Placement._by_counts

    def spy(self, instances, here, answer):
        seen.append((here.reasoning, here.fresh))
        return decide(self, instances, here, answer)

    monkeypatch.setattr(Placement, "_by_counts", spy)
    work = Workload([0.0] * 3, [100] * 3, [10, 20, 30], [50] * 3)
    simulate(Setup(cost=SMALL, instances=1), ARMS["paper"], work)
    assert seen == [(2, 0), (1, 1), (0, 2)]


def test_unlimited_memory_is_never_short():
    setup, work = Setup(cost=SMALL, instances=2), load("arena-hard", 150, 1.5, seed=2)
    rows = {name: figures(setup, work, simulate(setup, ARMS[name], work)) for name in ARMS}
    assert rows["INF"]["pauses"] == 0
    # No bound in the strict sense: fewer at once also means shorter steps.
    assert all(rows["INF"]["mean_ttfo"] < 1.02 * row["mean_ttfo"] for row in rows.values())
    assert rows["INF"]["p99_slowdown"] < 0.8 * rows["fcfs"]["p99_slowdown"]


def test_figures_of_bins_and_big_prompts_by_hand():
    outcome = Outcome.empty(20)
    work = Workload([0.0] * 20, [100] * 18 + [5000] * 2, [100] * 10 + [600] * 10, [2] * 20)
    idle = alone(SMALL, work)
    outcome.arrival[:] = np.arange(20.0)
    outcome.first_token[:] = outcome.reasoning_end[:] = outcome.arrival + idle / 2
    outcome.first_answer[:] = outcome.arrival + idle * np.array([2] * 10 + [3] * 8 + [5] * 2)
    outcome.finished[:] = outcome.first_answer
    outcome.qoe[:] = 1
    outcome.moved[:] = outcome.pauses[:] = 0
    outcome.busy_s = 1.0
    found = figures(Setup(cost=SMALL), work, outcome)
    assert found["mean_slowdown_big_prompts"] == pytest.approx(5)
    assert found["worst_bin"] == "512-1000"
    assert found["worst_bin_slowdown"] == pytest.approx(5)
    assert found["steadiness"] == pytest.approx(19 / np.percentile(found_e2e(outcome), 99))


def found_e2e(outcome):
    return outcome.finished - outcome.arrival


def test_copies_beside_the_decoding_by_hand():
    """The first request, after its quantum, gives way to the third; the second runs meanwhile."""
    slow = dataclasses.replace(SMALL, capacity=950, copy_token_s=1 / 550, prefill_token_s=5e-3)
    work = Workload([0.0, 5.7, 6.3], [400, 50, 400], [300, 60, 50], [5, 5, 5])

    def run(**changes):
        setup = Setup(cost=dataclasses.replace(slow, **changes), instances=1, quantum=100)
        outcome = simulate(setup, ARMS["rr-restart"], work)
        assert outcome.pauses.tolist() == [1, 0, 0]
        return outcome

    blocking, beside = run(copies_beside=False), run(copies_beside=True, copy_launch_s=0.0)
    launched = run(copies_beside=True, copy_launch_s=0.3)
    copy_s = slow.copy(520)
    # Decoding goes on while the copy runs, but for its launch.
    assert blocking.finished[1] - beside.finished[1] > 0.8 * copy_s
    assert launched.finished[1] - beside.finished[1] == pytest.approx(0.3, abs=0.05)
    # Memory is free after the copy, and not before.
    for outcome in (blocking, beside):
        took = outcome.first_token[2] - outcome.arrival[2] - slow.prefill(400)
        assert copy_s < took < copy_s + 0.1
    # The request that comes back decodes after its own copy.
    steps = (300 + 1 + 1 - 120) * slow.step_s
    assert beside.first_answer[0] - beside.finished[2] > copy_s + 0.8 * steps


def test_later_turns_come_after_their_pause_and_find_their_prefix():
    rows = [
        {"arrival_s": 0.0, "prompt_tokens": 2000, "thinking_tokens": 20, "answer_tokens": 10,
         "conversation": 7},
        {"arrival_s": 0.0, "prompt_tokens": 2100, "thinking_tokens": 20, "answer_tokens": 10,
         "conversation": 7, "turn": 1, "pause_s": 3.0, "history_tokens": 2010},
    ]  # fmt: skip
    for name in ("pascal", "sglang"):
        outcome = simulate(Setup(cost=SMALL, instances=4), ARMS[name], from_rows(rows))
        assert outcome.arrival[1] == pytest.approx(outcome.finished[0] + 3.0)
        took = outcome.first_token - outcome.arrival
        if name == "pascal":
            assert outcome.instance[0] == outcome.instance[1]
            assert took[1] == pytest.approx(SMALL.prefill(100))
        assert took[0] == pytest.approx(SMALL.prefill(2000))


def test_the_command_prints_tables_and_a_page_shows_them(tmp_path, capsys):
    from evals import page
    from pascal_sglang.sim.__main__ import main

    out = tmp_path / "sim.json"
    asked = "run alpacaeval --requests 60 --instances 2 --seeds 1 --processes 1 --arms fcfs,pascal"
    assert main([*asked.split(), "--load", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "tail TTFO (s)" in shown
    for column in ("SLO viol %", "worst bin", "big prompts", "e2e mean", "a ramp: arrivals last"):
        assert column in shown
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("INF")] == ["INF"] * 2
    page.write([out], tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_every_remedy_runs(capsys):
    from pascal_sglang.sim.__main__ import main

    assert main("remedies --requests 15 --seeds 1 --processes 1".split()) == 0
    shown = capsys.readouterr().out
    for arm in ablations.arms():
        assert shown.count(f"\n{arm.name}  ") >= len(ablations.LOADS)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("run nowhere.jsonl", "no file 'nowhere.jsonl'; sources are alpacaeval"),
        ("run alpacaeval --cost {bad} --arms rr", "not a cost file"),
        ("run {bad}", "not a request"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, asked, said):
    from pascal_sglang.sim.__main__ import main

    bad = tmp_path / "bad.json"
    bad.write_text('{"prompt_tokens": 0}\n')
    assert main(asked.format(bad=bad).split()) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_the_papers_comparison_is_whole():
    """Two data sets, three rates, every arm, three seeds; every figure of the paper has ours."""
    tasks = paper.tasks(requests=150)
    ran = {(t.source, t.load, t.arm.name, t.seed) for t in tasks}
    for source in paper.SOURCES:
        for load_name in paper.LOADS:
            assert {(source, load_name, arm, seed) for arm in ARMS for seed in range(3)} <= ran
    rows = run_all([t for t in tasks if t.seed == 0 and t.load == "high"], processes=1)
    lines = paper.against(rows)
    assert len(lines) > 20
    for line in lines[1:]:
        cells = re.split(r"\s{2,}", line.strip())
        # Little ends before the last of so few requests arrives.
        left_out = any(name in line for name in ("low", "medium", "throughput"))
        assert left_out or cells[2] != "-", line


def test_sources_are_those_of_the_load_generator():
    from evals.workload import generate

    for source in (*LENGTHS, "servegen-r1"):
        items, mine = generate(source, 50, 2.0, 3), draw(source, 50, 2.0, 3)
        assert [i.arrival_s for i in items] == mine.arrival_s
        assert [i.prompt_tokens for i in items] == mine.prompt
        assert [i.thinking_tokens for i in items] == mine.thinking
        assert [i.answer_tokens for i in items] == mine.answer


def test_shapes_are_those_of_the_load_generator():
    from evals.workload import Recipe, build

    shapes = {"burst_s": (20.0, 40.0)}, {"turns": 3.0, "pause_s": 5.0}, {"fits": 4000}
    shapes = *shapes, {"turns": 4.0, "fits": 6000}
    burst = {"arrivals": "burst", "burst_on_s": 20.0, "burst_off_s": 40.0}
    recipes = burst, *shapes[1:]
    for shape, recipe in zip(shapes, recipes, strict=True):
        items = build(Recipe(source="servegen-r1", requests=60, rate=2.0, seed=3, **recipe))
        mine = draw("servegen-r1", 60, 2.0, 3, Shape(**shape))
        theirs = from_rows([dataclasses.asdict(item) for item in items])
        for column in ("prompt", "thinking", "answer", "talk", "history", "follows", "pause_s"):
            assert getattr(mine, column) == getattr(theirs, column), column
        first = [i for i in range(len(mine)) if i not in mine.later]
        assert [mine.arrival_s[i] for i in first] == [theirs.arrival_s[i] for i in first]


def test_requests_that_fit_nowhere_are_left_out_with_the_turns_after_them():
    for turns in (1.0, 4.0):
        whole, cut = (
            draw("servegen-r1", 400, 1.0, 0, Shape(turns=turns, fits=fits))
            for fits in (1 << 60, 12000)
        )
        kv = [p + whole.output(i) for i, p in enumerate(whole.prompt)]
        assert max(kv) > 12000 >= max(p + cut.output(i) for i, p in enumerate(cut.prompt))
        assert len(cut) <= sum(tokens <= 12000 for tokens in kv)
        simulate(Setup(cost=SMALL, instances=2), ARMS["pascal"], cut)


def test_loads_are_of_the_requests_that_fit():
    setup = Setup(cost=PRESETS["r1-qwen-32b-h100-80"], instances=1)
    work = draw("servegen-r1", 20_000, 1.0, 1, Shape(fits=setup.cost.capacity))
    output = np.array([work.output(i) for i in range(len(work))])
    prompt = np.array(work.prompt)
    held = (output * (prompt + output / 2)).sum() / output.sum()
    whole = setup.cost.rate(prompt.mean(), output.mean(), held)
    assert paper.rate("servegen-r1", 0.7, setup) == pytest.approx(0.7 * whole, rel=0.03)


def test_a_share_of_answers_is_read_by_programs_and_of_requests_is_interactive():
    shape = Shape(programs=0.5, interactive=0.3)
    work = draw("alpacaeval", 2000, 1.0, 0, shape)
    assert np.mean(work.program) == pytest.approx(0.5, abs=0.05)
    assert np.mean(work.interactive) == pytest.approx(0.3, abs=0.05)
    plain = draw("alpacaeval", 2000, 1.0, 0)
    assert (plain.prompt, plain.arrival_s) == (work.prompt, work.arrival_s)


def test_violations_are_of_human_readers():
    work = Workload([0.0, 100.0], [100] * 2, [50] * 2, [20] * 2, program=[True, False])
    outcome = simulate(Setup(cost=SMALL, instances=1), ARMS["pascal"], work)
    outcome.qoe[:] = 0.5, 1.0
    found = figures(Setup(cost=SMALL, instances=1), work, outcome)
    assert found["slo_violations"] == 0
    assert found["mean_e2e_program"] == pytest.approx(outcome.finished[0])


def test_the_policy_is_told_who_reads():
    work = load("arena-hard", 100, 1.5, seed=2)
    setup = Setup(cost=SMALL, instances=2)
    e2e = []
    for programs in (False, True):
        read = dataclasses.replace(work, program=[programs] * len(work))
        outcome = simulate(setup, ARMS["pascal"], read)
        e2e.append((outcome.finished - outcome.arrival).mean())
    assert e2e[1] < e2e[0]
