"""Metric files on a disk that fills up, which is a small one of this test's."""

import errno
import os
import subprocess
import sys

import pytest
from prometheus_client.mmap_dict import MmapedDict

from pascal_sglang.cluster.metric_files import opening, reserving

SCRIPT = """
import sys
from prometheus_client import Counter, Histogram
from pascal_sglang.cluster.metric_files import survive_a_full_disk
counter = Counter("kinds", "Requests by kind.", ["kind"])
counter.labels("early").inc()
if sys.argv[2] == "ours":
    survive_a_full_disk()
with open(sys.argv[1] + "/fill", "wb", buffering=0) as fill:
    try:
        while True:
            fill.write(bytes(4096))
    except OSError:
        pass
for i in range(3000):
    counter.labels(f"late {i}").inc(i)
seconds = Histogram("seconds", "Of a type that has no file yet.", ["kind"])
seconds.labels("late").observe(0.5)
assert seconds.labels("late")._sum.get() == 0.5
assert counter.labels("early")._value.get() == 1
assert [counter.labels(f"late {i}")._value.get() for i in range(3000)] == list(range(3000))
"""


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(("whose", "code"), [("prometheus_client's", -7), ("ours", 0)])
def test_metrics_survive_a_full_disk(small_disk, whose, code):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(small_disk), whose],
        capture_output=True,
        text=True,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(small_disk)},
    )
    assert done.returncode == code, done.stderr
    if whose == "ours":
        assert done.stderr.count("stay in memory") == 2, "once for each of the two files"


def test_a_file_system_that_cannot_reserve_is_trusted(tmp_path, monkeypatch):
    """Its metrics stay where they are looked for."""

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    path = str(tmp_path / "counter_1.db")
    opening(MmapedDict.__init__)(values := MmapedDict.__new__(MmapedDict), path)
    reserving(MmapedDict._init_value)(values, "key")
    values.write_value("key", 7.0, 0.0)
    assert [(k, v) for k, v, *_ in MmapedDict.read_all_values_from_file(path)] == [("key", 7.0)]
