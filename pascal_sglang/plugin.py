"""SGLang plugin: installs the seams in every process, or refuses to serve.

Entry point `pascal` in the group `sglang.srt.plugins`. Does nothing unless `PASCAL_SGLANG_CONFIG`
is set. SGLang's loader logs a plugin's errors and serves on without it, so whatever goes wrong
here leaves as `SystemExit`, which that loader does not catch.

`python -m pascal_sglang.plugin check` prints the table of seams and exits 1 if one has moved;
`--against VERSION` compares another release, and `--record` says that one was read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pascal_sglang import older_sglang
from pascal_sglang.config import ACTOR_ENV, CONFIG_ENV, ConfigError, PascalConfig
from pascal_sglang.seams import (
    SeamError,
    check_seams,
    installed,
    load_seams,
    seams_path,
    verify_seams,
)

_installed = False


class Refusal(SystemExit):
    """Ends the process with one line; not an `Exception`, so no plugin loader swallows it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"pascal_sglang refuses to serve: {reason}")


@dataclass(frozen=True, slots=True)
class Hook:
    """One change to SGLang. `only_main`: meant for the launching process. `with_ray`: only where
    SGLang's Ray backend is asked for; its modules import Ray, which need not be installed."""

    target: str
    kind: str
    load: Callable[[], Any]
    only_main: bool = False
    with_ray: bool = False

    @property
    def module(self) -> str:
        """The module part of `target`: everything before the first capitalised or last name."""
        parts = self.target.split(".")
        for index, part in enumerate(parts):
            if part.lstrip("_")[:1].isupper():
                return ".".join(parts[:index])
        return ".".join(parts[:-1])


def _scheduler() -> Any:
    from pascal_sglang.engine.scheduler import PascalScheduler

    return PascalScheduler


def _controller() -> Any:
    from pascal_sglang.cluster.controller import PascalController

    return PascalController


def _detokenizer() -> Any:
    from pascal_sglang.entrypoints.detokenizer import event_loop

    return event_loop


def _pace_stream() -> Any:
    from pascal_sglang.streaming.pace_stream import generate_request

    return generate_request


def _apply_effort() -> Any:
    from pascal_sglang.entrypoints.answer_eta import apply_effort

    return apply_effort


def _client_code() -> Any:
    from pascal_sglang.entrypoints.client_code import refuse

    return refuse


def _frontend(name: str) -> Callable[[], Any]:
    def load() -> Any:
        from pascal_sglang.entrypoints import http_server

        return getattr(http_server, name)

    return load


def _ray(name: str) -> Callable[[], Any]:
    def load() -> Any:
        from pascal_sglang.entrypoints import ray_actors

        return getattr(ray_actors, name)

    return load


_STATS = "sglang.srt.observability.req_time_stats"
HOOKS = (
    Hook("sglang.srt.managers.scheduler.Scheduler", "replace", _scheduler),
    Hook(f"{_STATS}.APIServerReqTimeStats.__getstate__", "around", _frontend("keep_created_time")),
    Hook(
        f"{_STATS}.DPControllerReqTimeStats.__getstate__", "around", _frontend("keep_created_time")
    ),
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController",
        "replace",
        _controller,
    ),
    Hook(
        "sglang.srt.managers.detokenizer_manager.DetokenizerManager.event_loop",
        "around",
        _detokenizer,
    ),
    Hook(
        "sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
        "around",
        _frontend("require_handshake"),
        only_main=True,
    ),
    Hook(
        "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
        "around",
        _frontend("name_control_folder"),
        only_main=True,
    ),
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "around",
        _frontend("run_http_server"),
        only_main=True,
    ),
    Hook(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.get_internal_state",
        "around",
        _frontend("withhold_status"),
        only_main=True,
    ),
    Hook(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
        ".get_hicache_l3_cache_layout",
        "around",
        _frontend("living_layouts"),
        only_main=True,
    ),
    Hook(
        "sglang.srt.entrypoints.http_server.serve_generate_request",
        "around",
        _frontend("assume_reasoning"),
        only_main=True,
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        _pace_stream,
        only_main=True,
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
        "around",
        _apply_effort,
        only_main=True,
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "before",
        _client_code,
        only_main=True,
    ),
    Hook(
        "sglang.srt.ray.engine._create_scheduler_actor",
        "around",
        _ray("create_scheduler_actor"),
        only_main=True,
        with_ray=True,
    ),
    Hook(
        "sglang.srt.observability.cpu_monitor.start_cpu_monitor_thread",
        "around",
        _ray("start_cpu_monitor"),
        only_main=True,
        with_ray=True,
    ),
    Hook(
        "sglang.srt.ray.engine.RayEngine._launch_scheduler_processes",
        "around",
        _ray("require_handshake"),
        only_main=True,
        with_ray=True,
    ),
    Hook(
        "sglang.srt.ray.engine.RayEngine._launch_dp_scheduler_processes",
        "around",
        _ray("launch_instances"),
        only_main=True,
        with_ray=True,
    ),
    Hook(
        "sglang.srt.multimodal.transport.determine_tensor_transport_mode",
        "around",
        _ray("carry_features"),
        only_main=True,
        with_ray=True,
    ),
)


def activate() -> None:
    """Entry point: verify and install the seams if `PASCAL_SGLANG_CONFIG` asks for us.

    Raises `Refusal` on a bad configuration, a seam that moved, or a hook that did not take.
    """
    if not os.environ.get(CONFIG_ENV):
        return
    try:
        PascalConfig.from_env()
        if (warning := verify_seams()) is not None and multiprocessing.parent_process() is None:
            print(f"pascal_sglang: warning: {warning}", file=sys.stderr, flush=True)
        _install()
    except (ConfigError, SeamError) as error:
        raise Refusal(str(error)) from None
    except Exception as error:
        raise Refusal(f"the plugin failed to install: {error!r}") from error


def is_installed() -> bool:
    """Whether the seams are in place in this process."""
    return _installed


def _install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    global _installed
    # Child processes get only what their own role imported: importing the HTTP server into a
    # scheduler would cost seconds and memory. The launching process gets everything.
    is_main = multiprocessing.parent_process() is None and ACTOR_ENV not in os.environ
    with_ray = "sglang.srt.ray.engine" in sys.modules or "--use-ray" in sys.argv
    older_sglang.install(everywhere=is_main, with_ray=with_ray)
    hooks = [
        hook
        for hook in HOOKS
        if (is_main or (not hook.only_main and hook.module in sys.modules))
        and (with_ray or not hook.with_ray)
    ]
    loaded = [(hook, hook.load()) for hook in hooks]
    for hook, implementation in loaded:
        HookRegistry.register(hook.target, implementation, HookType(hook.kind))
    HookRegistry.apply_hooks()
    for hook, implementation in loaded:
        _require_taken(hook, implementation, HookRegistry._patched)
    _installed = True


def _require_taken(hook: Hook, implementation: Any, patched: set[str]) -> None:
    import pkgutil

    now = pkgutil.resolve_name(hook.target)
    taken = (
        now is implementation if isinstance(implementation, type) else hasattr(now, "__wrapped__")
    )
    if hook.target not in patched or not taken:
        raise SeamError(f"the hook on {hook.target} did not take")


def check() -> int:
    """Print every seam with its verdict; 0 if all hold, 1 otherwise."""
    tree = installed()
    findings = check_seams(tree=tree)
    width = max(len(f.seam.symbol) for f in findings)
    print(f"sglang {tree.version}, {len(findings)} seams")
    for f in findings:
        print(
            f"{f.verdict:<12} {f.seam.how:<9} {f.seam.symbol:<{width}} {f.found:<17} {f.seam.why}"
        )
    return 0 if all(f.ok for f in findings) else 1


def check_against(version: str, diff: bool) -> int:
    """Print what became of every seam in another release; 0 if nothing has to be read, else 1."""
    from pascal_sglang.sglang_releases import compare, names_gone, release, report

    old, new = installed(), release(version)
    changes = compare(load_seams(), old, new)
    for line in report(changes, old.version, new.version, diff):
        print(line)
    if gone := names_gone(old, new):
        print(f"names that we use and that sglang {new.version} has nowhere: {', '.join(gone)}")
    return 1 if any(change.to_reread for change in changes) else 0


def record(version: str | None) -> int:
    """Write the digests of a release into the seam list, once its seams were read."""
    from pascal_sglang.sglang_releases import record, release

    tree = installed() if version is None else release(version)
    count = record(seams_path(), tree)
    print(f"recorded {count} seams of sglang {tree.version} in {seams_path()}")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pascal_sglang.plugin", allow_abbrev=False)
    command = parser.add_subparsers(required=True).add_parser(
        "check", help="compare the seams with the installed SGLang", allow_abbrev=False
    )
    command.add_argument(
        "--against",
        metavar="VERSION",
        help="compare another release with the installed one; downloads its wheel alone",
    )
    how = command.add_mutually_exclusive_group()
    how.add_argument("--diff", action="store_true", help="with --against: the sources' differences")
    how.add_argument(
        "--record",
        action="store_true",
        help="write the digests of the installed release, or of --against, into seams.toml",
    )
    options = parser.parse_args(argv)
    if options.diff and options.against is None:
        parser.error("--diff needs --against")
    try:
        if options.record:
            return record(options.against)
        if options.against is not None:
            return check_against(options.against, options.diff)
        return check()
    except SeamError as error:
        print(f"pascal_sglang: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
