"""The seam list: complete, true to the installed SGLang, and strict about every change."""

import dataclasses
import inspect
import pkgutil
import sys

import pytest

from pascal_sglang import plugin, seams
from pascal_sglang.config import CONFIG_ENV, PascalConfig
from pascal_sglang.seams import SeamError, check_seams, load_seams, seams_path, source_digest


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
    digest = next(iter(victim.digests.values()))
    monkeypatch.setattr(seams, "seams_path", lambda: altered(tmp_path, digest, "0" * 16))
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


def test_another_sglang_version_is_refused(monkeypatch):
    monkeypatch.setattr(seams, "sglang_version", lambda: "9.9.9")
    with pytest.raises(SeamError, match=r"9\.9\.9 is not supported"):
        seams.verify_seams()


def test_digest_follows_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(seams, "_package_root", lambda _: tmp_path)
    module = tmp_path / "m.py"

    def digest(text):
        module.write_text(text)
        seams._parse.cache_clear()
        return source_digest("pkg.m", "C.f")

    first = digest("class C:\n    def f(self):\n        return 1\n")
    assert first is not None
    assert digest("x = 1\n\nclass C:\n    def f(self):\n        return 1\n") == first
    assert digest("class C:\n    def f(self):\n        return 2\n") != first
    assert digest("class C:\n    @staticmethod\n    def f(self):\n        return 1\n") != first
    assert digest("class C:\n    pass\n") is None


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
        assert seam.symbol in out
    assert plugin.main(["bogus"]) == 2


def test_importing_the_plugin_is_cheap():
    import subprocess

    code = (
        "import sys, pascal_sglang.plugin; "
        "sys.exit(any(m.split('.')[0] in ('torch', 'sglang', 'zmq') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
