"""The server's own folder is removed on every way out, and its status file survives the rest."""

import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from types import SimpleNamespace

import pytest

from pascal_sglang.cluster import control_channel, private_folder, status_file
from pascal_sglang.cluster.private_folder import LONGEST_NAME, PrivateFolder, remove_ownerless
from pascal_sglang.cluster.status_file import StatusFile
from pascal_sglang.config import LaunchError
from pascal_sglang.entrypoints.preflight import (
    SGLANG_SOCKET,
    SOCKET_ADDRESS,
    check_temporary_folder,
)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def owner(folder, told):
    tempfile.tempdir = str(folder)
    told.send(PrivateFolder().path)
    signal.pause()


def test_what_a_killed_owner_left_is_swept_and_what_a_live_one_has_is_not(temporary):
    living = PrivateFolder()
    hears, told = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=owner, args=(temporary, told))
    process.start()
    assert hears.poll(60)
    path = hears.recv()
    assert remove_ownerless() == []
    process.kill()
    process.join()
    assert remove_ownerless() == [path]
    assert not os.path.exists(path)
    assert os.stat(living.path).st_mode & 0o777 == 0o700
    private_folder.remove_all()
    assert os.listdir(temporary) == []


def test_what_is_not_ours_stays(temporary):
    (temporary / "pascal-notes").mkdir()
    (temporary / "pascal-12345678").mkdir()
    (temporary / "pascal-abcdefgh").write_text("a file")
    (temporary / "pascal-abcd1234").symlink_to(temporary / "pascal-notes")
    before = sorted(os.listdir(temporary))
    assert remove_ownerless() == []
    assert sorted(os.listdir(temporary)) == before


def test_a_folder_that_was_removed_comes_back_with_the_next_write(temporary):
    folder = temporary / "pascal-abcdefgh"
    shown = StatusFile(str(folder))
    shown.show(0.0, lambda: {"n": 1})
    assert status_file.read(shown.path)["n"] == 1
    shutil.rmtree(folder)
    shown.show(1.0, lambda: {"n": 2})
    assert status_file.read(shown.path)["n"] == 2
    assert folder.stat().st_mode & 0o777 == 0o700
    assert status_file.read(shown.path)["shown_s_ago"] < 60
    assert shown.failed == 0


def test_a_folder_of_somebody_elses_is_not_written_into(temporary):
    (temporary / "pascal-abcdefgh").write_text("theirs")
    shown = StatusFile(str(temporary / "pascal-abcdefgh"))
    shown.show(0.0, lambda: {})
    assert shown.failed == 1


def full(folder, told):
    """No file may grow: as on a full disk, a write fails."""
    shown = StatusFile(folder)
    shown.show(0.0, lambda: {"n": 1})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    for now in (1.0, 1.1, 2.0):
        shown.show(now, lambda: {"n": 2})
    failed = shown.failed
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    shown.show(3.0, lambda: {"n": 3})
    told.send((failed, status_file.read(shown.path)["n"]))


def test_a_full_disk_is_counted_and_got_over(tmp_path):
    hears, told = multiprocessing.Pipe(duplex=False)
    arguments = (str(tmp_path), told)
    process = multiprocessing.get_context("spawn").Process(target=full, args=arguments)
    process.start()
    assert hears.poll(60)
    assert hears.recv() == (2, 3)
    process.join()


@pytest.mark.parametrize(("instances", "name"), [(1, f"/{SGLANG_SOCKET}"), (2, f"/{LONGEST_NAME}")])
def test_a_temporary_folder_with_too_long_a_name_is_refused_in_one_line(
    instances, name, monkeypatch
):
    arguments = SimpleNamespace(dp_size=instances, attn_dp_size=1)
    longest = "/" + "x" * (SOCKET_ADDRESS - len(name) - 1)
    monkeypatch.setattr(tempfile, "tempdir", longest)
    check_temporary_folder(arguments)
    monkeypatch.setattr(tempfile, "tempdir", longest + "x")
    with pytest.raises(LaunchError, match="TMPDIR") as refused:
        check_temporary_folder(arguments)
    assert "\n" not in str(refused.value)


def test_the_longest_name_is_that_of_a_letter_box(temporary):
    folder = PrivateFolder()
    address = control_channel.address_of(folder.path, control_channel.CONTROLLER).removeprefix(
        f"ipc://{temporary}/"
    )
    private_folder.remove_all()
    assert len(address) == len(LONGEST_NAME)
