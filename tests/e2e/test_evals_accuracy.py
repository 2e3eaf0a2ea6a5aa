"""`python -m evals.accuracy` against stock SGLang and ours: the tiny model knows nothing, twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import environment
from tests.requests import thinking

ROOT = Path(__file__).parents[2]
ROWS = {
    "gsm8k": {"question": "What is {i} and {i}?", "answer": "{i} + {i}\n#### {i}"},
    "humaneval": {
        "prompt": "def f{i}():\n    '''Give {i}.'''\n",
        "entry_point": "f{i}",
        "test": "def check(candidate):\n    assert candidate() == {i}\n",
    },
}


@pytest.mark.parametrize(
    "dataset",
    [
        pytest.param(
            "gsm8k",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 13), reason="sgl-eval installs there with a compiler only"
            ),
        ),
        "humaneval",
    ],
)
def test_both_servers_give_the_same_answers(dataset, stock_server, pascal_server, tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    rows = [{k: v.replace("{i}", str(i)) for k, v in ROWS[dataset].items()} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "evals.accuracy", "--dataset", dataset, "--path", str(path)),
            *("--base-url", f"stock={stock_server.base_url}"),
            *("--base-url", f"pascal={pascal_server.base_url}"),
            *("--limit", "6", "--concurrency", "3", "--max-tokens", "40", "--require-parity"),
            *("--extra-body", json.dumps({**thinking(12), "ignore_eos": True}), "--out", str(out)),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "parity stock / pascal: 6 of 6 the same" in done.stdout
    result = json.loads(out.read_text())
    assert list(result["arms"]) == ["stock", "pascal"]
    for arm in result["arms"].values():
        assert (arm["questions"], arm["wrong"], arm["accuracy"]) == (6, 6, 0.0)
        assert arm["correct"] + arm["no_answer"] + arm["timeout"] + arm["error"] == 0
        assert [item["name"] for item in arm["items"]] == [f"{dataset}-{i}" for i in range(6)]
        for item in arm["items"]:
            # Twelve tokens of thinking and its marker; a token of the tiny model is a letter.
            assert (item["reasoning_tokens"], item["completion_tokens"]) == (13, 40)
            assert item["thinking_characters"] == 12
            assert len(item["answer"]) == 27
            # A busy server sends several tokens in one go.
            assert 0 < item["ttft_ms"] <= item["ttfo_ms"] <= item["e2e_latency_ms"]
            assert 0 < item["qoe"] <= 1
        assert arm["server_info"]["version"]
        assert 0 < arm["mean_ttft_ms"] <= arm["mean_ttfo_ms"] <= arm["p99_ttfo_ms"]
