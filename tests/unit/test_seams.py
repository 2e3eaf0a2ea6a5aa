"""The seam list: complete, true to the installed SGLang, and strict about every change."""

import dataclasses
import inspect
import pkgutil
import sys

import pytest

from pascal_sglang import plugin, seams
from pascal_sglang.config import CONFIG_ENV, PascalConfig
from pascal_sglang.seams import (
    ACCEPT_ENV,
    EVERY,
    Finding,
    Seam,
    SeamError,
    SourceTree,
    check_seams,
    digest,
    installed,
    load_seams,
    seams_path,
    supported_versions,
)


def altered(tmp_path, old, new):
    text = seams_path().read_text()
    assert old in text
    changed = tmp_path / "seams.toml"
    changed.write_text(text.replace(old, new, 1))
    return changed


def test_every_seam_holds_for_the_installed_sglang():
    assert [f.seam.symbol for f in check_seams() if not f.ok] == []


def test_whoever_uses_a_seam_exists():
    for seam in load_seams():
        pkgutil.resolve_name(seam.by)


def test_a_changed_digest_is_named(tmp_path, monkeypatch):
    victim = load_seams()[3]
    recorded = victim.digests[installed().version]
    monkeypatch.setattr(seams, "seams_path", lambda: altered(tmp_path, recorded, "0" * 16))
    with pytest.raises(SeamError) as caught:
        seams.verify_seams()
    assert victim.symbol in str(caught.value)
    assert "changed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_symbol_that_is_gone_is_named(tmp_path, monkeypatch):
    changed = altered(tmp_path, "Scheduler.get_init_info", "Scheduler.get_init_infos")
    monkeypatch.setattr(seams, "seams_path", lambda: changed)
    with pytest.raises(SeamError, match="get_init_infos is missing"):
        seams.verify_seams()


def called(monkeypatch, version):
    """The installed SGLang under another version number."""
    tree = dataclasses.replace(installed(), version=version)
    monkeypatch.setattr(seams, "installed", lambda: tree)


def test_another_sglang_version_is_refused(monkeypatch):
    called(monkeypatch, "9.9.9")
    with pytest.raises(SeamError, match=r"9\.9\.9 is not supported") as caught:
        seams.verify_seams()
    for version in supported_versions(load_seams()):
        assert version in str(caught.value)
    assert f"{ACCEPT_ENV}=9.9.9" in str(caught.value)
    monkeypatch.setenv(ACCEPT_ENV, "9.9.8")
    with pytest.raises(SeamError, match="is not supported"):
        seams.verify_seams()


def test_another_version_can_be_accepted_knowingly(monkeypatch):
    called(monkeypatch, "9.9.9")
    monkeypatch.setenv(ACCEPT_ENV, "9.9.9")
    warning = seams.verify_seams()
    assert warning is not None
    assert "9.9.9 was accepted unread" in warning


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("Scheduler.get_init_info", "Scheduler.get_init_infos", "get_init_infos is missing"),
        ('"forward_stream_ctx", "future_map"]', '"a_name", "future_map"]', "has no a_name"),
    ],
)
def test_what_is_gone_cannot_be_accepted(tmp_path, monkeypatch, old, new, says):
    changed = altered(tmp_path, old, new)
    monkeypatch.setattr(seams, "seams_path", lambda: changed)
    called(monkeypatch, "9.9.9")
    monkeypatch.setenv(ACCEPT_ENV, "9.9.9")
    with pytest.raises(SeamError, match=says):
        seams.verify_seams()


def test_a_version_is_supported_once_every_seam_is_recorded_for_it():
    def seam(*versions, until=None):
        return Seam("m:f", "use", "x", "y", dict.fromkeys(versions, "0"), until=until)

    both = [seam("0.5.9", "0.5.10", "0.5.10.post1"), seam("0.5.10.post1", "0.5.10", "0.5.11")]
    assert supported_versions(both) == ["0.5.10", "0.5.10.post1"]
    assert supported_versions([*both, seam("0.5.10", until="0.5.10")]) == ["0.5.10", "0.5.10.post1"]
    assert supported_versions([*both, seam(until="0.5.10")]) == ["0.5.10.post1"]


FIRST = """
x = 1

@decorated
class C(Base):
    size: int = 1

    def __init__(self, room, *, late: bool = False):
        self.room = room
        self.queue: list = []

    def f(self, req: Req, *, late: bool = False) -> int:
        return self.queue.pop(req.rid)
"""


def found_in(tmp_path, text, name, how="use", fields=()):
    """What there is of a symbol of one module, as it would be recorded."""
    (tmp_path / "pkg").mkdir(exist_ok=True)
    (tmp_path / "pkg" / "m.py").write_text(text)
    seams._parse.cache_clear()
    seam = Seam(f"pkg.m:{name}", how, "x", "y", {"1": "?"}, fields)
    return Finding(seam, None, SourceTree(tmp_path, "1").find(seam))


def changes(tmp_path, old, new, name, how="use", fields=()):
    """Whether the digest of a seam changes when `old` becomes `new` in the module."""
    assert old in FIRST
    before = found_in(tmp_path, FIRST, name, how, fields).found
    return before != found_in(tmp_path, FIRST.replace(old, new), name, how, fields).found


@pytest.mark.parametrize(
    ("old", "new"),
    [("req.rid", "req.id"), ("-> int", "-> str"), ("def f(self", "@static\n    def f(self")],
)
def test_any_change_of_what_we_override_counts(tmp_path, old, new):
    assert changes(tmp_path, old, new, "C.f", "override")


def test_a_change_elsewhere_in_the_file_does_not(tmp_path):
    assert not changes(tmp_path, "x = 1", "x = 1\ny = 2\n", "C.f", "override")


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("self.queue.pop(req.rid)", "self.queue.get(req.rid)", False),
        ("req: Req", "req: Any", False),
        ("self, req: Req", "self, request: Req", True),
        ("late: bool = False) -> int", "late: bool = True) -> int", True),
        (", *, late: bool = False) -> int", ") -> int", True),
        ("def f(self", "async def f(self", True),
        ("self.queue.pop", "self.line.pop", True),  # It relies on that name.
    ],
)
def test_of_what_we_use_the_interface_counts(tmp_path, old, new, counts):
    assert changes(tmp_path, old, new, "C.f", fields=("queue",)) is counts


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("self.queue.pop(req.rid)", "None", False),
        ("self.room = room", "self.room = room\n        self.more = 1", False),
        ("size: int = 1", "size: int = 2", True),
        ("self.queue: list = []", "self.queue: dict = {}", True),
        ("def f(self, req", "def f(self, request", True),
        ("self, room", "self, room, more", True),
        ("C(Base)", "C(Other)", True),
    ],
)
def test_of_a_class_that_we_use_the_named_fields_count(tmp_path, old, new, counts):
    assert changes(tmp_path, old, new, "C", fields=("size", "queue", "f")) is counts


def test_a_field_more_counts_where_every_field_does(tmp_path):
    more = "self.room = room\n        self.more = 1"
    assert changes(tmp_path, "self.room = room", more, "C", fields=(EVERY,))
    assert not changes(tmp_path, "def f(self", "def g(self", "C", fields=(EVERY,))


def test_the_digest_of_its_source_is_good_for_what_we_use_too(tmp_path):
    found = found_in(tmp_path, FIRST, "C.f")
    assert found.verdict == "NOT RECORDED"
    source = digest(found.symbol.source)
    assert source != found.found
    assert dataclasses.replace(found, expected=source).ok


def test_a_symbol_that_a_version_lacks_is_recorded_so(tmp_path):
    found = found_in(tmp_path, FIRST, "C.g")
    assert found.found == "absent"
    assert dataclasses.replace(found, expected="absent").ok
    there = found_in(tmp_path, FIRST, "C.f")
    assert dataclasses.replace(there, expected="absent").verdict == "CHANGED"


def test_a_field_that_is_gone_is_named(tmp_path, monkeypatch):
    changed = altered(tmp_path, '["result_queue"]', '["a_queue"]')
    text = changed.read_text()
    symbol = "Scheduler.event_loop_overlap"
    head, tail = text[: text.index(symbol)], text[text.index(symbol) :]
    version = installed().version
    begin = tail.index(f'"{version}" = "') + len(f'"{version}" = "')
    changed.write_text(head + tail[:begin] + "0" * 16 + tail[begin + 16 :])
    monkeypatch.setattr(seams, "seams_path", lambda: changed)
    with pytest.raises(SeamError, match=f"{symbol} has no a_queue in sglang"):
        seams.verify_seams()


def test_what_we_override_and_wrap_is_on_the_list():
    from sglang.srt.managers.data_parallel_controller import DataParallelController
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    from pascal_sglang.cluster.controller import PascalController
    from pascal_sglang.cluster.watched_controller import WatchedController
    from pascal_sglang.engine.operations import OperationsScheduler
    from pascal_sglang.engine.scheduler import (
        PascalInvariantChecker,
        PascalOutputStreamer,
        PascalScheduler,
    )
    from pascal_sglang.engine.stock_load_figures import (
        PascalLoadInquirer,
        PascalMetricsReporter,
        ReportingScheduler,
    )

    listed = {seam.symbol for seam in load_seams()}
    generated = set(vars(dataclasses.make_dataclass("Any", [], frozen=True, slots=True)))
    for ours, stock in (
        (PascalScheduler, PascalScheduler.__mro__[1]),
        (OperationsScheduler, OperationsScheduler.__mro__[1]),
        (ReportingScheduler, ReportingScheduler.__mro__[1]),
        (PascalMetricsReporter, PascalMetricsReporter.__mro__[1]),
        (PascalLoadInquirer, PascalLoadInquirer.__mro__[1]),
        (PascalOutputStreamer, SchedulerOutputStreamer),
        (PascalInvariantChecker, PascalInvariantChecker.__mro__[1]),
        (PascalController, DataParallelController),
        (WatchedController, DataParallelController),
    ):
        for name in vars(ours):
            defined = next((c for c in stock.__mro__ if name in vars(c)), None)
            if defined in (None, object) or not inspect.isroutine(getattr(ours, name)):
                continue
            if name in generated and dataclasses.is_dataclass(ours):
                continue
            assert f"{defined.__module__}:{defined.__qualname__}.{name}" in listed
    for hook in plugin.HOOKS:
        symbol = f"{hook.module}:{hook.target.removeprefix(hook.module + '.')}"
        assert any(s == symbol or s.startswith(f"{symbol}.") for s in listed), symbol


def test_no_configuration_no_activity(monkeypatch):
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    monkeypatch.setattr(plugin, "verify_seams", lambda: pytest.fail("looked at SGLang"))
    plugin.activate()
    assert not plugin.is_installed()


@pytest.mark.parametrize("text", ["{", '{"policy": "best"}'])
def test_a_bad_configuration_is_refused_past_sglangs_loader(monkeypatch, text):
    monkeypatch.setenv(CONFIG_ENV, text)
    with pytest.raises(SystemExit, match="refuses to serve"):
        plugin.activate()


def test_a_hook_that_did_not_take_is_refused(monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, PascalConfig().to_json())
    gone = plugin.Hook("sglang.srt.plugins.no_such_function", "around", lambda: lambda f: f())
    monkeypatch.setattr(plugin, "HOOKS", (gone,))
    with pytest.raises(SystemExit, match="no_such_function"):
        plugin.activate()
    assert not plugin.is_installed()


def test_check_prints_the_table(capsys):
    assert plugin.main(["check"]) == 0
    out = capsys.readouterr().out
    for seam in load_seams():
        if seam.concerns(installed().version):
            assert seam.symbol in out
    with pytest.raises(SystemExit) as caught:
        plugin.main(["bogus"])
    assert caught.value.code == 2


def test_importing_the_plugin_is_cheap():
    import subprocess

    code = (
        "import sys, pascal_sglang.plugin; "
        "sys.exit(any(m.split('.')[0] in ('torch', 'sglang', 'zmq') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
