"""The memory that a process may take is that of its control group, where that is less."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine import build
from pascal_sglang.engine.host_memory import HostMemory, host_memory

MIB = 2**20
JOIN = 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"'
SHOW = """
from pascal_sglang.engine.host_memory import host_memory
print(host_memory().free, host_memory().limited)
"""


def proc(folder, *, cgroup, mountinfo):
    made = folder / "proc"
    made.mkdir()
    (made / "cgroup").write_text(cgroup)
    (made / "mountinfo").write_text(mountinfo)
    return made


def group(folder, limit, used, cached, *, version):
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {cached}\nfile 9\n")


def version_2(tmp_path, path="/pod/box", root="/"):
    mounted = tmp_path / "cgroup"
    return mounted, proc(
        tmp_path,
        cgroup=f"0::{path}\n",
        mountinfo=f"29 23 0:26 {root} {mounted} rw,nosuid - cgroup2 cgroup2 rw\n",
    )


def test_the_group_of_the_process_counts(tmp_path):
    mounted, at = version_2(tmp_path)
    group(mounted / "pod" / "box", 100 * MIB, 60 * MIB, 10 * MIB, version=2)
    assert host_memory(at).free == 50 * MIB
    assert host_memory(at).limited


def test_and_every_group_above_it(tmp_path):
    mounted, at = version_2(tmp_path)
    group(mounted / "pod" / "box", "max", 60 * MIB, 0, version=2)
    group(mounted / "pod", 80 * MIB, 75 * MIB, 0, version=2)
    assert host_memory(at).free == 5 * MIB


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    mounted, at = version_2(tmp_path, path="/")
    group(mounted, 100 * MIB, 40 * MIB, 0, version=2)
    assert host_memory(at).free == 60 * MIB


def test_a_path_from_outside_of_the_mount_is_its_root(tmp_path):
    mounted, at = version_2(tmp_path, path="/../other", root="/pod")
    group(mounted, 100 * MIB, 40 * MIB, 0, version=2)
    assert host_memory(at).free == 60 * MIB


def test_part_of_the_tree_may_be_mounted(tmp_path):
    mounted, at = version_2(tmp_path, path="/pod/box", root="/pod")
    group(mounted / "box", 100 * MIB, 90 * MIB, 0, version=2)
    assert host_memory(at).free == 10 * MIB


def test_the_first_version_is_read_too(tmp_path):
    mounted = tmp_path / "memory"
    at = proc(
        tmp_path,
        cgroup="5:cpu,cpuacct:/\n4:memory:/box\n0::/\n",
        mountinfo=f"30 23 0:27 / {mounted} rw - cgroup cgroup rw,memory\n"
        f"31 23 0:28 / {tmp_path} rw - cgroup cgroup rw,cpu,cpuacct\n",
    )
    group(mounted / "box", 64 * MIB, 32 * MIB, 16 * MIB, version=1)
    group(mounted, 2**63 - 4096, 0, 0, version=1)
    assert host_memory(at).free == 48 * MIB


def test_more_than_the_limit_leaves_nothing(tmp_path):
    mounted, at = version_2(tmp_path)
    group(mounted / "pod" / "box", 10 * MIB, 60 * MIB, 0, version=2)
    assert host_memory(at).free == 0


@pytest.mark.parametrize("text", ["", "max\n", "many\n"])
def test_no_limit_and_what_cannot_be_read_leave_the_machines(tmp_path, text):
    mounted, at = version_2(tmp_path)
    group(mounted / "pod" / "box", 10 * MIB, 60 * MIB, 0, version=2)
    (mounted / "pod" / "box" / "memory.max").write_text(text)
    assert not host_memory(at).limited
    assert host_memory(at).free <= psutil.virtual_memory().total


def test_without_control_groups_it_is_the_machines(tmp_path):
    assert not host_memory(tmp_path).limited


def test_a_real_group_limits_a_real_process():
    """In a group of the kernel's own, which wants root."""
    for mounted, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        made = mounted / f"pascal-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            (made / limit).write_text(str(2**30))
            done = subprocess.run(
                ["sh", "-c", JOIN, "sh", str(made), sys.executable, "-c", SHOW],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            free, limited = done.stdout.split()
            assert limited == "True"
            assert 2**29 < int(free) <= 2**30
            return
        except OSError:
            continue
        finally:
            made.rmdir()
    pytest.skip("no memory control group can be made here")


def test_the_total_is_the_least_limit_and_does_not_change_with_use(tmp_path):
    mounted, at = version_2(tmp_path)
    box = mounted / "pod" / "box"
    group(box, 100 * MIB, 60 * MIB, 10 * MIB, version=2)
    assert host_memory(at).total == 100 * MIB
    (box / "memory.current").write_text(f"{90 * MIB}\n")
    assert host_memory(at).total == 100 * MIB
    (box / "memory.max").write_text("max\n")
    assert host_memory(at).total == psutil.virtual_memory().total


@pytest.mark.parametrize(("beside", "tokens"), [(0, 500), (100_000, 250), (300_000, 0)])
def test_paused_kv_is_given_no_memory_that_moves_take(beside, tokens, monkeypatch):
    memory = HostMemory(free=400_000, limited=False, total=800_000)
    monkeypatch.setattr(build, "host_memory", lambda: memory)
    monkeypatch.setattr(build, "instance_count", lambda: 2)
    monkeypatch.setattr(build, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    copies = SimpleNamespace(copies=True, bytes_per_token=100, states=None, windows=None)
    scheduler = SimpleNamespace(max_total_num_tokens=1000)
    found = build.host_budget(copies, scheduler, PascalConfig(), beside)
    assert found == (tokens, 0, 0)
