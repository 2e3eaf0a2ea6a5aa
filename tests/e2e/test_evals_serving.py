"""`python -m evals.serving` against stock SGLang: left alone, interrupted, and beside SGLang's own
benchmark."""

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

from evals import page, workload
from evals.arms import load_plan
from evals.bench import agreement
from tests.harness import environment

ROOT = Path(__file__).parents[2]
TINY = "pascal_sglang.demo.budget:TinyThinkingBudget"
# What both `sglang.benchmark.serving` and we write.
SHARED = (
    "backend dataset_name request_rate max_concurrency server_info duration completed "
    "total_input_tokens total_output_tokens request_throughput input_throughput output_throughput "
    "total_throughput concurrency max_output_tokens_per_s max_concurrent_requests "
    "mean_e2e_latency_ms std_e2e_latency_ms mean_ttft_ms median_ttft_ms p99_ttft_ms mean_tpot_ms "
    "mean_itl_ms p95_itl_ms max_itl_ms goodput_slos_ms request_goodput slo_attainment "
    "slo_attainment_by_metric"
).split()


def command(server, out, *more):
    return [
        *(sys.executable, "-m", "evals.serving", "--base-url", server.base_url),
        *("--dataset-name", "tiny-live", "--logit-processor", TINY, "--output-file", str(out)),
        *more,
    ]


def test_a_run_against_stock_sglang_and_its_page(stock_server, tmp_path):
    out = tmp_path / "run.jsonl"
    done = subprocess.run(
        command(
            stock_server,
            out,
            *("--num-prompts", "10", "--request-rate", "5", "--scale", "0.3", "--seed", "7"),
            *("--goodput", "ttft:60000", "ttfo:60000", "answer_tpot:1"),
            "--output-details",
        ),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = out.read_text().splitlines()
    seen = json.loads(line)
    assert [key for key in SHARED if key not in seen] == []
    assert (seen["completed"], seen["failed"], seen["no_answer"]) == (10, 0, 0)
    # Lengths are the workload's to the token: thinking, its marker, and an answer.
    assert sum(seen["output_lens"]) == seen["total_output_tokens"]
    assert seen["reasoning_tokens"] == sum(seen["reasoning_lens"])
    assert seen["reasoning_tokens"] + seen["answer_tokens"] == seen["total_output_tokens"]
    assert sum(seen["bin_requests"]) == 10
    assert 0 < seen["median_ttft_ms"] < seen["median_ttfo_ms"] < seen["median_e2e_latency_ms"]
    assert seen["slo_attainment_by_metric"]["ttfo"] == 1.0
    assert seen["slo_attainment_by_metric"]["answer_tpot"] < 1.0
    assert seen["idle"]["per_token_s"] > 0
    assert seen["server_info"]["version"]
    for label in (
        "Successful requests:                     10",
        "Mean TTFO (ms):",
        "P99 ITL (ms):",
    ):
        assert label in done.stdout
    html = tmp_path / "run.html"
    assert page.main([str(out), "--out", str(html)]) == 0
    assert 'id="timeline"' in html.read_text()


def test_ctrl_c_reports_what_it_has(stock_server, tmp_path):
    out = tmp_path / "cut.jsonl"
    # A request every second for ten minutes, so that one is always to come.
    run = subprocess.Popen(
        command(stock_server, out, "--num-prompts", "600", "--request-rate", "1", "--no-idle-fit"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # The bar moves when a request has ended: the run is under way. It may skip numbers.
        assert run.stderr is not None
        shown = ""
        while not re.search(r" [1-9]\d*/600", shown):
            piece = run.stderr.read(1)
            assert piece, f"ended early: {shown[-2000:]}"
            shown += piece
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 130
    seen = json.loads(out.read_text())
    assert seen["interrupted"] is True
    assert seen["completed"] >= 1
    assert seen["unsent"] + seen["completed"] + seen["failed"] == 600
    assert set(seen["errors"]) <= {"interrupted"}
    assert "requests were not sent" in said


def test_sglangs_own_benchmark_does_the_same_work(stock_server, tiny_model, tmp_path):
    """Both tools, once each: the same lengths item by item, and every figure that is compared."""
    plan = load_plan(ROOT / "evals" / "arms" / "ample.toml", requests=6)
    load = agreement.Load(math.inf, 3)
    wanted = agreement.requests(plan, load)
    workload.save(wanted, tmp_path / "ours.jsonl")
    agreement.write_theirs(wanted, tmp_path / "theirs.jsonl")
    bench = agreement.Bench(stock_server.base_url, tiny_model, tmp_path, len(wanted))
    we, they = agreement.ours(bench, load), agreement.theirs(bench, load)
    assert agreement.differences([we], [they]) == []
    assert we["output_lens"] == [item.output_tokens for item in wanted]
    assert not any("n/a" in line for line in agreement.table([we], [they]))
