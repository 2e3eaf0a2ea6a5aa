"""The command line of `evals.serving`: workloads, refusals, and a server that fails under way."""

import http.server
import json
import math
import threading

import pytest

from evals import serving, workload
from evals.load import processor, remote
from evals.load.attended import Watched
from evals.load.client import LAG_LIMIT_MS
from evals.load.record import Record
from evals.workload import Item, WorkloadError


def build(*arguments):
    return serving.build(serving.parse(arguments))


def test_a_source_is_drawn_at_the_rate_and_seed_asked_for():
    asked = ["--dataset-name", "tiny-live", "--num-prompts", "20", "--seed", "3"]
    slow = build(*asked, "--request-rate", "2")
    assert slow == workload.build(
        workload.Recipe(source="tiny-live", requests=20, rate=2.0, seed=3)
    )
    at_once = build(*asked, "--request-rate", "inf")
    assert {item.arrival_s for item in at_once} == {0.0}
    assert [i.thinking_tokens for i in at_once] == [i.thinking_tokens for i in slow]


def test_a_saved_workload_keeps_its_arrivals(tmp_path):
    file = tmp_path / "saved.jsonl"
    items = [Item(0.5 * i, 8, 3 + i, 4) for i in range(5)]
    workload.save(items, file)
    assert build("--dataset-name", str(file), "--num-prompts", "3") == items[:3]
    with pytest.raises(WorkloadError, match="own arrivals"):
        build("--dataset-name", str(file), "--request-rate", "2")
    (first, *_) = build("--dataset-name", str(file), "--request-rate", "inf")
    assert first.arrival_s == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset-name", "nothing-like-it"], "nothing-like-it"),
        (["--output-file", "/no/such/folder/x.jsonl"], "no such folder"),
        (["--dataset-name", "tiny-live", "--logit-processor", "no file"], "no file"),
        (["--dataset-name", "tiny-live", "--logit-processor", "json:Nothing"], "Nothing"),
        (
            ["--dataset-name", "gsm8k", "--base-url", "http://127.0.0.1:9"],
            "no server answers at http://127.0.0.1:9",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert serving.main(arguments) == serving.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_objectives_are_named_as_sglang_names_them():
    asked = serving.parse(["--goodput", "ttft:500", "ttfo:5000", "answer_tpot:50", "e2el:9e3"])
    assert dict(asked.goodput) == {"ttft": 500, "ttfo": 5000, "answer_tpot": 50, "e2el": 9000}
    for bad in ("qoe:1", "ttft", "ttft:-1", "ttft:x"):
        with pytest.raises(SystemExit):
            serving.parse(["--goodput", bad])
    assert serving.parse(["--request-rate", "inf"]).request_rate == math.inf


@pytest.mark.parametrize("url", ["nonsense", "127.0.0.1:30000", "ftp://x"])
def test_an_address_that_is_none_is_refused(url, capsys):
    with pytest.raises(SystemExit) as left:
        serving.parse(["--base-url", url])
    assert left.value.code == serving.EXIT_BAD_INPUT
    assert f"not http://HOST:PORT: {url!r}" in capsys.readouterr().err
    assert serving.parse(["--base-url", "http://x:1/v1/"]).base_url == "http://x:1"


def test_processors_by_each_of_their_names(tmp_path):
    file = tmp_path / "processor.json"
    file.write_text('{"callable": "ab"}\n')
    assert processor.resolve("none") == ""
    assert processor.resolve(str(file)) == '{"callable": "ab"}'
    assert processor.resolve('{"callable": "cd"}') == '{"callable": "cd"}'
    for bad in ("a:b:c", "os;x:Y", ":X", "module:"):
        with pytest.raises(processor.ProcessorError, match="not a file"):
            processor.resolve(bad)


def test_waiting_for_a_server_is_said_at_once(capsys):
    assert not remote.wait_ready("http://127.0.0.1:9", 0.01)
    assert capsys.readouterr().err == (
        "no server answers at http://127.0.0.1:9 yet; waiting up to 0.01 s\n"
    )
    assert not remote.wait_ready("http://127.0.0.1:9", 0)
    assert capsys.readouterr().err == ""


def test_counters_change_and_new_ones_count_from_zero():
    assert remote.change({"a": 2.0}, {"a": 5.0, "b": 1.0}) == {"a": 3.0, "b": 1.0}


@pytest.mark.parametrize("command", ["--api-key s3cret --port 1", "--admin-api-key=s3cret -x"])
def test_keys_in_a_servers_command_are_hidden(command, monkeypatch):
    told = json.dumps({"launch_command": command, "api_key": "s3cret"})
    monkeypatch.setattr(remote, "get", lambda *_: told)
    seen = remote.server_info("http://x")
    assert "s3cret" not in str(seen)
    assert "***" in seen["launch_command"]


class Fails(http.server.BaseHTTPRequestHandler):
    """Two tokens of whatever was asked for, then the connection closes."""

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        meta = {"completion_tokens": 2, "reasoning_tokens": 2, "finish_reason": None}
        self.wfile.write(b"data: " + json.dumps({"meta_info": meta}).encode() + b"\n\n")

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def failing_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fails) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_a_failing_server_gave_is_kept_and_counted(failing_server, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    asked = ["--base-url", failing_server, "--dataset-name", "tiny-live", "--num-prompts", "4"]
    asked += ["--request-rate", "inf", "--output-file", str(out), "--disable-tqdm"]
    assert serving.main([*asked, "--no-idle-fit"]) == serving.EXIT_BAD_INPUT
    assert "warm-up request failed: stream ended early" in capsys.readouterr().err
    assert not out.exists()
    for _ in range(2):
        quiet = [*asked, "--warmup-requests", "0", "--no-idle-fit"]
        assert serving.main(quiet) == serving.EXIT_FAILED
    first, second = map(json.loads, out.read_text().splitlines())
    for seen in (first, second):
        assert (seen["completed"], seen["failed"]) == (0, 4)
        assert seen["errors"] == ["stream ended early"]
        assert seen["total_output_tokens"] == 8
        assert (seen["counters"], seen["server_info"]) == ({}, {})
    assert "error: stream ended early" in capsys.readouterr().out


def test_details_list_errors_by_request_and_the_report_each_of_them_once(
    failing_server, tmp_path, capsys
):
    out = tmp_path / "out.jsonl"
    asked = ["--base-url", failing_server, "--dataset-name", "tiny-live", "--num-prompts", "3"]
    asked += ["--request-rate", "inf", "--output-file", str(out), "--disable-tqdm"]
    asked += ["--warmup-requests", "0", "--no-idle-fit", "--output-details"]
    assert serving.main(asked) == serving.EXIT_FAILED
    assert json.loads(out.read_text())["errors"] == ["stream ended early"] * 3
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error:")]
    assert said == ["error: stream ended early"]


def test_a_client_that_was_late_says_so():
    asked = serving.parse(["--no-idle-fit"])
    items = [Item(0.0, 8, 3, 4)]
    record = Record(0.0, 0.0, [0.1] * 8, 4, finished=True)
    for lag_ms, said in ((LAG_LIMIT_MS + 1, True), (LAG_LIMIT_MS - 1, False)):
        back = Watched(items=items, records=[record], lag_p99_ms=lag_ms)
        lines = serving.console(asked, serving.figures(asked, back, None, {}))
        assert any("CLIENT LATE" in line for line in lines) is said
