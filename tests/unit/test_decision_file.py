"""Decisions in a file: whole lines of JSON, whatever the disk and other processes do."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

from pascal_sglang.cluster.decision_file import DecisionFile
from pascal_sglang.config import LaunchError, PascalConfig
from pascal_sglang.entrypoints.preflight import check_decision_log


def test_lines_are_json_with_unix_time_and_the_file_is_ours_alone(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_text('{"before": 1}\n')
    for instance in (0, 1):
        DecisionFile(str(path), instance).append({"decision": "pause", "rid": 'a"\n{'})
    before, *lines = map(json.loads, path.read_text().splitlines())
    assert before == {"before": 1}
    assert [line["dp_rank"] for line in lines] == [0, 1]
    assert all(line["rid"] == 'a"\n{' and abs(line["time"] - time.time()) < 60 for line in lines)
    made = tmp_path / "new.jsonl"
    DecisionFile(str(made)).append({})
    assert made.stat().st_mode & 0o777 == 0o600


WRITER = """
import sys
from pascal_sglang.cluster.decision_file import DecisionFile
file = DecisionFile(sys.argv[1], int(sys.argv[2]))
for number in range(2000):
    file.append({"number": number, "rid": "x" * 200})
"""


def test_processes_do_not_cut_each_others_lines(tmp_path):
    path = str(tmp_path / "decisions.jsonl")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, str(rank)]) for rank in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    for rank in range(3):
        assert [line["number"] for line in lines if line["dp_rank"] == rank] == list(range(2000))


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path, caplog):
    path = tmp_path / "decisions.jsonl"
    file = DecisionFile(str(path))
    file.append({"n": 0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a disk does that has room for half a line: SIGXFSZ is ignored in Python.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        file.append({"n": 1})
        file.append({"n": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.failed == 2
    assert len(caplog.records) == 1
    file.append({"n": 3})
    whole = []
    for line in path.read_text().splitlines():
        try:
            whole.append(json.loads(line)["n"])
        except ValueError:
            continue
    assert whole == [0, 3]


def test_a_file_that_cannot_be_written_is_refused_at_start(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "file", "No such file or directory"),
        (tmp_path / "pipe", "No such device or address"),
        ("/dev/null", "not a regular file"),
    ):
        with pytest.raises(LaunchError, match=why):
            check_decision_log(PascalConfig(decision_log=str(path)))
    check_decision_log(PascalConfig(decision_log=str(tmp_path / "decisions.jsonl")))
    check_decision_log(PascalConfig())
