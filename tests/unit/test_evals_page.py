"""Pages of hand-made results, read back with an HTML parser."""

import gzip
import json
from html.parser import HTMLParser

import pytest

from evals import page
from evals.load.record import Idle, Record
from evals.load.timeline import details
from evals.reporting import words
from evals.reporting.metrics import bin_edges, summarize
from evals.reporting.svg import looks
from evals.workload import Item
from pascal_sglang.policy.registry import POLICIES

VOID = {"meta", "br", "hr", "img", "input", "link"}
ARMS = ["fcfs", 'pas<cal> & "co" $x$', "rr"]
LENGTHS = (4, 4, 9, 20, 33, 50, 70)


class Page(HTMLParser):
    """Insists on balanced tags; keeps tables, text, and everything that could be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.text, self.addresses, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self.keep(attrs)

    def handle_starttag(self, tag, attrs):
        self.keep(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def keep(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name.endswith(("href", "src")) or "url(" in (value or ""):
                self.addresses.append(value)

    @property
    def words(self):
        return " ".join(self.text)


def summary(slow=1.0, answered=True, idle=True):
    items = [Item(float(i), 8, thinking, 3) for i, thinking in enumerate(LENGTHS)]
    records = []
    for item in items:
        times = [item.arrival_s + slow * 0.1 * (k + 1) for k in range(item.output_tokens)]
        tokens = times if answered else []
        thought = item.thinking_tokens + 1
        records.append(Record(item.arrival_s, item.arrival_s, tokens, thought, answered))
    edges = bin_edges(LENGTHS, 3)
    alone = Idle(0.1, 0.05) if idle else None
    seen = summarize(records, items, idle=alone, target_tpot_s=0.1, edges=edges)
    return edges, seen | details(records, items)


def comparison(bare=False):
    """As `evals.compare` writes it; `bare`: as it was before timelines and verdicts."""
    runs = []
    for place, arm in enumerate(ARMS):
        for rate in ("medium", "high"):
            for seed in range(2):
                edges, seen = summary(1.0 + place)
                if bare:
                    del seen["ttfos"], seen["timelines"]
                runs.append(
                    {
                        "arm": arm,
                        "rate": rate,
                        "seed": seed,
                        "summary": seen,
                        "counters": {} if bare else {"pascal:pauses_total": 17.0},
                        "lag_p99_ms": 1.5,
                    }
                )
    plan = {
        "preset": "tiny-live",
        "requests": 7,
        "seeds": 2,
        "kv_tokens": 99,
        "target_tpot_ms": 25.0,
        "flags": ["--model-path", "{model}", "--max-total-tokens", "{kv_tokens}"],
        "rates": [{"name": "medium", "per_s": 2.5}, {"name": "high", "per_s": 4.5}],
        "arms": [{"name": arm, "command": "stock", "role": "stock"} for arm in ARMS],
    }
    told = {"plan": plan, "bin_edges": edges, "failed_arms": {}, "runs": runs}
    if not bare:
        targets = [
            {"name": "mean TTFO <= 0.6x", "seen": "0.50", "passed": True},
            {"name": "throughput >= 0.97x", "seen": "<0.9", "passed": False},
            {"name": "tail", "seen": "no data", "passed": None},
        ]
        told["comparison"] = {"loads": {"high": {ARMS[1]: {"verdict": targets}}}}
        told["provenance"] = {"command": "python -m evals.compare x", "versions": {"python": "3.9"}}
        told["failed_arms"] = {"gone": "server <ended> at start"}
    return told


def serving(**changes):
    edges, seen = summary(idle=False)
    return {
        "tag": None,
        "base_url": "http://10.0.0.1:30000",
        "dataset_name": "tiny-live",
        "request_rate": "inf",
        "seed": 4,
        "bin_edges": edges,
        "counters": {},
        "lag_p99_ms": 2.0,
        "server_info": {"version": "0.5.23", "model_path": "org/model", "launch_command": "-x 1"},
        "provenance": {"command": "python -m evals.serving", "versions": {"sglang": "9.9"}},
        **seen,
        **changes,
    }


def render(tmp_path, *files):
    paths = []
    for number, told in enumerate(files):
        lines = told if isinstance(told, list) else [told]
        paths.append(tmp_path / f"r{number}.json")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "page.html"
    assert page.main([*map(str, paths), "--out", str(out)]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of a comparison."""
    return render(tmp_path_factory.mktemp("page"), comparison())


def test_a_comparison_is_whole_well_formed_and_needs_nothing_else(compared):
    text = compared
    seen = Page(text)
    assert all(address.startswith(("#", "url(#", "clip-path: url(#")) for address in seen.addresses)
    referred = {address.partition("#")[2].rstrip(")") for address in seen.addresses}
    assert referred <= set(seen.ids)
    assert not any(word in text for word in ("<script", "@import", "http://", "https://"))
    assert len(seen.ids) == len(set(seen.ids))
    assert {"load", "cdf", "bins", "slowdown", "rate", "timeline"} <= set(seen.ids)
    assert 'class="absent"' not in text


def test_every_arm_has_its_count_in_every_bin(compared):
    seen = Page(compared)
    tables = [t for t in seen.tables if t[0][0] == "arm"]
    assert len(tables) == 2
    # Lengths 4 4 9 | 20 33 | 50 70, twice.
    for table in tables:
        assert [row[0] for row in table[1:]] == ARMS
        for row in table[1:]:
            assert [cell.split()[1] for cell in row[1:]] == ["(6)", "(4)", "(4)"]
    # Nine thinking tokens and the marker, then the first answering token: 0.1 s each.
    assert tables[0][1][1] == "1.100 (6)"
    assert tables[0][2][1] == "2.200 (6)"


def test_verdicts_counters_commands_and_notes_are_there_and_escaped(compared):
    text = compared
    shown = Page(text).words
    for said in (
        "pass: 0.50",
        "FAIL: <0.9",
        "not judged: no data",
        "KV capacity 99 tokens; tiny-live x1, 7 requests a run, 2 seeds",
        "gone gave up: server <ended> at start",
        "python -m sglang.launch_server --model-path MODEL --max-total-tokens 99",
        "python -m evals.compare x",
        "pascal:pauses_total",
        "median gap",
        ARMS[1],
    ):
        assert said in shown
    assert "<cal>" not in text
    assert 'class="FAIL"' in text
    # In words too, and each arm and term explained.
    for said in (
        "Missed targets:",
        "(throughput >= 0.97x: <0.9)",
        "SGLang as it is",
        "time to first output: from a request's arrival to its first answering token",
    ):
        assert said in shown
    (judged,) = [table for table in Page(text).tables if table[0][0] == "target"]
    assert judged[0] == ["target", ARMS[1]]
    assert [row[0] for row in judged[1:]] == ["mean TTFO <= 0.6x", "throughput >= 0.97x", "tail"]


def test_an_arm_looks_alike_on_every_page():
    every = looks(["oracle", "mine", "pascal", "rr, live", "rr, simulated", "rr-restart"])
    alone = looks(["pascal", "theirs"])
    assert every["pascal"] == alone["pascal"]
    assert every["rr, live"].colour == every["rr, simulated"].colour
    assert every["rr, live"] != every["rr, simulated"]
    del every["rr, simulated"]
    assert len({look.colour for look in every.values()}) == len(every)


def test_every_policy_of_the_package_is_explained():
    assert set(words.POLICIES) == set(POLICIES)


def test_conclusions_compare_candidates_with_the_best_stock_arm(tmp_path):
    told = comparison()
    for arm, role in zip(told["plan"]["arms"], ("candidate", "stock", "stock"), strict=True):
        arm |= {"role": role, "flags": ["--pascal-policy", "paper"] if role != "stock" else []}
    seen = Page(render(tmp_path, told))
    # The n-th arm takes n times 0.1 s a token; thinking, its end and the first answering token are
    # 29.14 tokens in the mean.
    first = f"mean TTFO against {ARMS[1]}, the best stock arm, 5.83 s: fcfs 2.91 s (0.50x)."
    assert seen.words.count(first) == 2
    assert "policy paper (the order of the PASCAL paper to the letter)" in seen.words


def test_what_an_older_result_lacks_is_said_and_not_drawn(tmp_path):
    text = render(tmp_path, comparison(bare=True))
    seen = Page(text)
    assert page.ABSENT["cdf"] in seen.words
    assert page.ABSENT["timeline"] in seen.words
    assert "No server showed a counter" in seen.words
    assert {"load", "bins", "slowdown", "rate"} <= set(seen.ids)
    assert "cdf" not in seen.ids


def test_runs_of_one_server_are_told_apart(tmp_path):
    runs = [serving(), serving(tag="ours", request_rate=2.0, interrupted=True)]
    text = render(tmp_path, runs)
    seen = Page(text)
    assert page.ABSENT["slowdown"] in seen.words
    for said in (
        "tiny-live, inf",
        "tiny-live, 2.0/s",
        "run 2, ours, was interrupted",
        "python -m evals.serving",
        "0.5.23",
    ):
        assert said in seen.words
    heads = [table[0][1:] for table in seen.tables if table[0][0] == ""]
    assert ["org/model"] in heads
    assert ["ours"] in heads
    assert "9.9" not in seen.words, "the server's own version counts, not the client's"


def test_a_run_in_which_nothing_answered_is_still_a_page(tmp_path):
    edges, nothing = summary(answered=False)
    seen = Page(render(tmp_path, serving(**nothing, request_rate="trace")))
    assert page.ABSENT["cdf"] in seen.words
    assert page.ABSENT["bins"] in seen.words
    (table,) = [t for t in seen.tables if t[0][0] == "arm"]
    assert table[1] == ["org/model", *["n/a (0)"] * (len(edges) + 1)]


@pytest.mark.parametrize(
    "text", ["", "no json\n", '{"a": 1}\n', "[1]\n", '{"runs": [], "plan": 3}']
)
def test_files_without_results_are_refused_by_name(tmp_path, text, capsys):
    file = tmp_path / "odd.json"
    file.write_text(text)
    assert page.main([str(file)]) == page.EXIT_BAD_INPUT
    assert "odd.json" in capsys.readouterr().err
    assert not file.with_suffix(".html").exists()


def test_a_compressed_file_has_the_same_page(compared, tmp_path, capsys):
    file = tmp_path / "r0.json.gz"
    file.write_bytes(gzip.compress(json.dumps(comparison()).encode()))
    out = tmp_path / "page.html"
    assert page.main([str(file), "--out", str(out)]) == 0
    whole, again = Page(compared), Page(out.read_text())
    assert again.words == whole.words
    file.write_bytes(file.read_bytes()[:100])
    assert page.main([str(file)]) == page.EXIT_BAD_INPUT
    assert "r0.json.gz" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert page.main([str(tmp_path / "gone.json")]) == page.EXIT_BAD_INPUT
    assert "gone.json: No such file" in capsys.readouterr().err
