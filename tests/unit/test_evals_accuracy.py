"""`evals.accuracy` against small servers of our own: counts, table, parity, refusals."""

import json
import re

import pytest

from evals import accuracy
from evals.grading import scores
from tests.chat_server import ChatServer, Script

ROWS = [{"prompt": f"Write a function f{i}.", "test": [f"assert f{i}() == {i}"]} for i in range(6)]
KEYS = (
    "name outcome found note error finish_reason answer thinking_characters reasoning_tokens "
    "completion_tokens ttft_ms ttfo_ms e2e_latency_ms qoe"
).split()


def number(prompt):
    return int(prompt.split("function f")[1].split(".")[0])


def right(i):
    return Script(answer=("```python\n", f"def f{i}(): return {i}\n", "```"))


def mixed(prompt):
    """Two right answers, then one of each thing that can go wrong."""
    i = number(prompt)
    wrong = [
        Script(answer=("```python\ndef f2(): return 0\n```",)),
        Script(answer=()),
        Script(status=500),
        Script(hangs=True),
    ]
    return right(i) if i < 2 else wrong[i - 2]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(rows, *arguments):
    """Exit code and result file, None where there is none."""
    out = rows.with_name("out.json")
    fixed = ["--dataset", "mbpp", "--path", str(rows), "--out", str(out), "--disable-tqdm"]
    code = accuracy.main([*fixed, *arguments])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_every_question_has_one_outcome(rows, capsys):
    with ChatServer(mixed) as server:
        code, result = run(rows, "--base-url", f"{server.base_url}/v1/", "--request-timeout-s", "1")
    assert code == 0
    (arm,) = result["arms"].values()
    assert arm["endpoint"]["model"] == "small"
    assert [item["outcome"] for item in arm["items"]] == [
        "correct", "correct", "wrong", "no_answer", "error", "timeout",
    ]  # fmt: skip
    assert {name: arm[name] for name in scores.OUTCOMES} == {
        "correct": 2, "wrong": 1, "no_answer": 1, "error": 1, "timeout": 1,
    }  # fmt: skip
    assert arm["questions"] == 6
    assert arm["accuracy"] == pytest.approx(1 / 3)
    assert arm["accuracy_low"] < 1 / 3 < arm["accuracy_high"]
    # Whoever never answered has no TTFO, and violates the objective of a reader.
    assert arm["slo_violations"] == pytest.approx(3 / 6)
    assert [item["ttfo_ms"] is None for item in arm["items"]] == [False] * 3 + [True] * 3
    assert all(set(item) == set(KEYS) for item in arm["items"])
    assert arm["items"][0]["ttft_ms"] <= arm["items"][0]["ttfo_ms"]
    assert arm["items"][0]["thinking_characters"] == len("Let me see.")
    assert arm["items"][2]["note"] == "AssertionError"
    assert arm["items"][2]["found"] == "def f2(): return 0\n"
    assert "sandbox" in result["grader"]
    said = capsys.readouterr().out
    assert re.search(r"^Accuracy \(%\): +33\.33$", said, re.MULTILINE)
    assert "error: HTTP 500: no" in said


def test_arms_stand_side_by_side_and_agree(rows, capsys):
    with ChatServer(mixed) as one, ChatServer(lambda p: right(number(p))) as other:
        arms = ["--base-url", f"one={one.base_url}", "--base-url", f"other={other.base_url}"]
        same = run(rows, *arms, "--require-parity", "--limit", "2")
        differ = run(rows, *arms, "--require-parity", "--limit", "5")
        said = capsys.readouterr().out
        told = run(rows, *arms, "--limit", "5")
        sampled = run(rows, *arms, "--limit", "5", "--temperature", "0.7")
    assert same[0] == 0
    assert same[1]["parity"][0]["holds"] is True
    assert "parity one / other: 2 of 2 the same\n" in said
    assert differ[0] == accuracy.EXIT_FAILED
    assert (
        "parity one / other: 2 of 5 the same; 2 differ: mbpp-2 (wrong / correct), mbpp-3 "
        "(no_answer / correct); 1 not finished by both: mbpp-4\n" in said
    )
    assert told[0] == 0
    assert list(told[1]["arms"]) == ["one", "other"]
    assert any(line.split() == ["one", "other"] for line in said.splitlines())
    accuracies = [line for line in said.splitlines() if line.startswith("Accuracy (%):")][-1]
    assert accuracies.split()[-2:] == ["40.00", "100.00"]
    assert sampled[1]["parity"] == []
    assert "parity: not checked" in capsys.readouterr().out


def test_ctrl_c_still_reports(rows):
    def script(prompt):
        i = number(prompt)
        return Script(ctrl_c=True, hangs=True) if i == 2 else right(i)

    with ChatServer(script) as one, ChatServer(script) as other:
        arms = ["--base-url", f"one={one.base_url}", "--base-url", f"other={other.base_url}"]
        code, result = run(rows, *arms, "--concurrency", "1")
        assert other.bodies == []
    assert code == accuracy.EXIT_INTERRUPTED
    assert result["interrupted"] is True
    first, second = result["arms"].values()
    assert (first["correct"], first["questions"], first["interrupted"]) == (2, 2, 4)
    assert (second["questions"], second["accuracy"], second["interrupted"]) == (0, None, 6)
    assert result["parity"][0]["unasked"] == 6


def test_a_server_that_answers_nothing_is_a_failure(rows):
    with ChatServer(lambda _: Script(status=500)) as server:
        code, result = run(rows, "--base-url", server.base_url)
    assert code == accuracy.EXIT_FAILED
    assert next(iter(result["arms"].values()))["error"] == 6


def test_grading_that_is_stopped_keeps_what_it_has(rows, monkeypatch, capsys):
    class Stubborn:
        name, prompt, any_thread = "s", "p", False

        def grade(self, answer):
            raise KeyboardInterrupt

    monkeypatch.setattr(accuracy.tasks, "load", lambda *_: [Stubborn()])
    with ChatServer(lambda _: Script()) as server:
        code, result = run(rows, "--base-url", server.base_url)
    assert code == accuracy.EXIT_INTERRUPTED
    (arm,) = result["arms"].values()
    assert arm["items"][0]["answer"] == "I do not know."
    assert arm["items"][0]["outcome"] == "interrupted"
    assert "stopped: interrupted" in capsys.readouterr().err


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base-url", NOBODY], f"no server answers at {NOBODY}"),
        (["--base-url", NOBODY, "--path", "/no/such/file"], "No such file"),
        (["--base-url", NOBODY, "--out", "/no/such/folder/x.json"], "no such folder"),
        (["--base-url", NOBODY, "--out", "/"], "a folder, not a file"),
        (["--base-url", NOBODY, "--require-parity"], "parity needs two servers"),
        (["--base-url", f"a={NOBODY}", "--base-url", f"a={NOBODY}"], "two servers are called a"),
        (
            ["--base-url", NOBODY, "--base-url", f"b={NOBODY}", "--require-parity",
             "--temperature", "1"],
            "--temperature 0",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(rows, arguments, said, capsys):
    code, result = run(rows, *arguments)
    assert (code, result) == (accuracy.EXIT_BAD_INPUT, None)
    error = capsys.readouterr().err
    assert error.startswith("evals: error: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset", "no-such-set"],
        ["--base-url", "127.0.0.1:30000"],
        ["--extra-body", "[1]"],
        ["--extra-body", "{"],
        ["--concurrency", "0"],
    ],
)
def test_options_that_are_none_are_refused(rows, arguments):
    with pytest.raises(SystemExit) as refused:
        run(rows, *arguments)
    assert refused.value.code == 2


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_the_interval_is_wilsons(successes, trials, low, high):
    assert scores.wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)
