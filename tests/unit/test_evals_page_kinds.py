"""The page draws every kind of result file, each written by the tool that writes it."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from evals import accuracy, arms, compare, page, serving
from evals.gpu import check, identity, moves
from evals.load.attended import Watched
from evals.load.record import Record
from evals.load.timeline import details
from evals.reporting import result_files
from evals.reporting.verdict import Run
from evals.workload import Item
from pascal_sglang.sim import __main__ as sim
from tests.chat_server import ChatServer, Script

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "evals" / "arms" / "live.toml"
ITEMS = [Item(float(i), 8, thinking, 3) for i, thinking in enumerate((4, 9, 20, 33))]


MOVED = {"migrations": {"outgoing": {"moved": 2}, "blocked_s": [], "bytes": 0}}


class Idle:
    """A server that has nothing to do."""

    base_url = ""

    def wait_ready(self, timeout_s):
        """It answers."""

    def stop(self):
        """It has ended."""


def records(step_s):
    return [
        Record(
            item.arrival_s,
            item.arrival_s,
            [item.arrival_s + step_s * (k + 1) for k in range(item.output_tokens)],
            item.thinking_tokens + 1,
            finished=True,
        )
        for item in ITEMS
    ]


def run_all(comparison):
    """Every arm under every load, without a server."""
    for arm in comparison.plan.arms:
        for rate in comparison.plan.rates:
            seen = records(0.05)
            summary = compare.summarize(
                seen, ITEMS, idle=None, target_tpot_s=0.1, edges=comparison.edges
            )
            summary |= details(seen, ITEMS) | {"kv_imbalance": None, "moves_per_request": 0.0}
            comparison.runs.append(Run(arm.name, rate.name, 0, summary, [4] * 4))


@pytest.fixture
def no_servers(monkeypatch):
    monkeypatch.setattr(compare.Comparison, "run_all", run_all)
    # A comparison draws its own page; that of its file is drawn here.
    monkeypatch.setattr(compare, "page", SimpleNamespace(write=lambda *_: None))
    monkeypatch.setattr(arms, "model_folder", lambda *_: Path("model"))
    monkeypatch.setattr(arms, "logit_processor", lambda *_: "")
    rest = {
        "pauses": {"host": 1, "resident": 1, "recompute": 1},
        "migrations": {"outgoing": {"moved": 2}},
        "policy_errors": 0,
        "kv_tokens": {"capacity": 9, "free": 9, "evictable": 0, "host": 0},
        "costs": {},
    }
    same = [identity.Reply([1], "stop")]
    found = identity.compare(same, same, same, [rest], [rest])
    monkeypatch.setattr(identity, "check", lambda *_: found)
    row = moves.row_of(300, [MOVED], [MOVED], [0.01])
    monkeypatch.setattr(moves, "measure", lambda *_: row)
    monkeypatch.setattr(arms, "serve", lambda *_, **__: Idle())
    probe = {"memory can be pinned": {"name": "memory can be pinned", "holds": True, "value": None}}
    monkeypatch.setattr(check.Check, "probe", lambda _: probe)


def of_compare(out):
    compare.main(
        [str(PLAN), "--quick", "--arms", "fcfs,pascal", "--rates", "high", "--out", str(out)]
    )


def of_check(out):
    check.main(["--device", "cpu", "--out", str(out.parent / "check")])
    return out.parent / "check" / "check.json"


def of_serving(out):
    asked = serving.parse(["--dataset-name", "tiny-live", "--goodput", "ttfo:5000"])
    back = Watched(items=ITEMS, records=records(0.05), lag_p99_ms=1.0)
    told = serving.figures(asked, back, None, {})
    provenance = serving.provenance("evals.serving", ["--api-key", "s3cret"])
    out.write_text(json.dumps(told | {"server_info": {}, "provenance": provenance}) + "\n")


def of_accuracy(out):
    rows = [{"prompt": f"Write f{i}.", "test": [f"assert f{i}() == {i}"]} for i in range(2)]
    file = out.with_suffix(".rows")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(lambda _: Script()) as one, ChatServer(lambda _: Script(status=500)) as other:
        accuracy.main(
            ["--dataset", "mbpp", "--path", str(file), "--out", str(out), "--disable-tqdm",
             "--base-url", f"one={one.base_url}", "--base-url", f"other={other.base_url}"]
        )  # fmt: skip


def of_simulated(out):
    shutil.copy(ROOT / "evals" / "results" / "simulated.json", out)


def of_sim(out):
    asked = "run tiny-live --requests 40 --instances 1 --seeds 1 --processes 1 --arms pascal,rr"
    sim.main([*asked.split(), "--out", str(out)])


def of_scenarios(out):
    asked = "scenarios servegen-h100-80 --requests 40 --seeds 1 --processes 1 --arms pascal"
    sim.main([*asked.split(), "--out", str(out)])


# Each with figures that its tables of means must have, for every arm.
KINDS = {
    "evals.compare": (of_compare, ("mean TTFO (s)", "P99 TTFO (s)", "mean answer TPOT (ms)")),
    "evals.gpu.check": (of_check, ("mean TTFO (s)", "P99 TTFO (s)", "failed")),
    "evals.serving": (of_serving, ("mean TTFO (s)", "P99 TTFO (s)", "failed")),
    "evals.accuracy": (of_accuracy, ("accuracy (%)", "failed", "no answer")),
    "evals.bench.simulated": (
        of_simulated,
        ("mean TTFO (s)", "mean TPOT (ms)", "SLO violations (%)"),
    ),
    "pascal_sglang.sim": (
        of_sim,
        ("mean TTFO (s)", "P99 TTFO (s)", "mean answer TPOT (ms)", "failed", "P99 slowdown"),
    ),
    "pascal_sglang.sim scenarios": (
        of_scenarios,
        ("mean TTFO (s)", "P99 TTFO (s)", "P99 slowdown", "mean E2E latency (s)"),
    ),
}


def test_every_tool_that_writes_results_is_here():
    """All of `evals` sign their results by `provenance`."""
    sources = [path.read_text() for path in (ROOT / "evals").rglob("*.py")]
    signed = {name for text in sources for name in re.findall(r'provenance\("([\w.]+)"', text)}
    assert signed == {kind for kind in KINDS if not kind.startswith("pascal_sglang.sim")}


@pytest.mark.usefixtures("no_servers")
@pytest.mark.parametrize("kind", KINDS)
def test_its_page_has_its_figures(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x"])
    write, wanted = KINDS[kind]
    written = write(tmp_path / "out.json") or tmp_path / "out.json"
    html = tmp_path / "page.html"
    assert page.main([str(written), "--out", str(html)]) == 0
    text = html.read_text()
    assert "s3cret" not in text
    section = re.search(r"<h2>Means over seeds</h2>.*?<h2>", text, re.DOTALL).group()
    tables = section.split("<h3>")[1:]
    assert tables
    for table in tables:
        head, *rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
        assert head[1:]
        found = {label: cells for label, *cells in rows}
        for figure in wanted:
            assert "n/a" not in found[figure]


def test_a_check_keeps_its_two_comparisons_apart(no_servers, tmp_path):
    results = result_files.load([of_check(tmp_path / "x")])
    assert {load.partition(":")[0] for load, _ in results.loads} == {"order", "overhead"}
    for line in (
        "probe: memory can be pinned",
        "identity: pauses forced",
        "prefixes: pauses forced",
        "overhead: a step, ms, pascal",
        "moves: tokens",
    ):
        assert any(told.startswith(line) for told in results.about), line
