"""Checks before anything heavy starts, each ending in one clear line."""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from pascal_sglang import support
from pascal_sglang.cluster.control_keys import problem_with_library, read_secret
from pascal_sglang.cluster.decision_file import DecisionFile
from pascal_sglang.cluster.private_folder import LONGEST_NAME
from pascal_sglang.cluster.transport import problem_with
from pascal_sglang.cluster.transport.listening import own_address
from pascal_sglang.config import LaunchError, PascalConfig
from pascal_sglang.entrypoints import sglang_flags
from pascal_sglang.platforms import CPU_PLATFORM

# The longest address of a Unix socket in bytes, without the final null.
SOCKET_ADDRESS = 107
# The length of what SGLang calls its sockets below the temporary folder.
SGLANG_SOCKET = "tmp12345678"


class OneLineParser(argparse.ArgumentParser):
    """Argument errors as one line; SGLang's usage text alone is hundreds of lines."""

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message} (--help lists all flags)")


def check_machine(argv: list[str]) -> None:
    """Choose the reference CPU platform for `--device cpu`; must run before SGLang is imported.

    Respects a platform somebody else chose. Ranks share the cores evenly, but for one that is left
    to the server's other processes: OpenMP threads that wait for a thread without a core spin, and
    slow each other down many times over.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--device", default=None)
    peek.add_argument("--dp-size", "--data-parallel-size", "--dp", type=int, default=1)
    peek.add_argument("--tp-size", "--tensor-parallel-size", "--tp", type=int, default=1)
    peek.add_argument("--pp-size", "--pipeline-parallel-size", "--pp", type=int, default=1)
    peek.add_argument("--enable-dp-attention", action="store_true")
    try:
        seen, _ = peek.parse_known_args(argv)
    except SystemExit:
        return  # SGLang's own parser reports it.
    if seen.device != "cpu" or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return
    os.environ.setdefault("SGLANG_PLATFORM", CPU_PLATFORM)
    ranks = max(1, seen.tp_size) * max(1, seen.pp_size)
    if not seen.enable_dp_attention:  # With it, instances share the ranks of one.
        ranks *= max(1, seen.dp_size)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (len(cores) - 1) // ranks)))
    if ranks > 1:
        # SGLang refuses more ranks than NUMA nodes without it; it binds nothing on this platform.
        binding = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)


def check_given(argv: list[str], *, has_model: bool) -> None:
    """Check model and port as far as `argv` alone says them: SGLang need not be imported for that.

    has_model: one is given elsewhere. Raises: `LaunchError` with one line.
    """
    given = sglang_flags.values(argv)
    defaults = sglang_flags.known().defaults
    if "config" in given or not defaults:
        return  # A file, or a source that cannot be read: `check_arguments` knows.
    if not has_model:
        if "model_path" not in given:
            raise LaunchError("--model-path is required (--help lists all flags)")
        _check_model(given["model_path"] or ".")
    host, port = (given.get(name) or defaults.get(name) for name in ("host", "port"))
    if host and (number := str(port)).isdecimal():
        _check_port(host, int(number))


def check_arguments(argv: list[str]) -> Any:
    """Parse SGLang's arguments and check model and port.

    Returns: SGLang's `ServerArgs`. Raises: `LaunchError` with one line.
    """
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    if "--config" not in argv and not {"-h", "--help"} & set(argv):
        parser = OneLineParser(prog="sglang serve", add_help=False)
        ServerArgs.add_cli_args(parser)
        parser.parse_args(argv)
    server_args = prepare_server_args(argv)
    _check_model(server_args.model_path)
    _check_port(server_args.host, server_args.port)
    return server_args


def check_migrations(config: PascalConfig, server_args: Any) -> None:
    """Refuse a KV transport that was asked for and is not there, and an address of another host."""
    if not config.can_migrate or support.instances_of(server_args) == 1:
        return
    problem = problem_with(config.kv_transport)
    if problem is not None:
        raise LaunchError(f"--pascal-kv-transport {config.kv_transport}: {problem}")
    # With Ray, instances may be on other hosts, each of which looks for its own address.
    if config.kv_listen is not None and not getattr(server_args, "use_ray", False):
        try:
            own_address(config.kv_listen)
        except ValueError as error:
            raise LaunchError(f"--pascal-kv-listen {config.kv_listen}: {error}") from None


def check_control(config: PascalConfig, server_args: Any) -> None:
    """Refuse control sockets over TCP at an address of another host, without encryption, or with a
    secret that is not one."""
    if config.control_listen is None:
        return
    if (problem := problem_with_library()) is not None:
        raise LaunchError(f"--pascal-control-listen: {problem}")
    if server_args.enable_dp_attention and not server_args.use_ray:
        raise LaunchError(
            "--pascal-control-listen does not work with DP attention without --use-ray: its "
            "instances start before the controller"
        )
    family = socket.AF_INET6 if ":" in config.control_listen else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((config.control_listen, 0))
    except OSError as error:
        problem = f"--pascal-control-listen {config.control_listen}: {error.strerror}"
        raise LaunchError(problem) from None
    if config.control_secret is not None:
        read_secret(config.control_secret)


def check_decision_log(config: PascalConfig) -> None:
    """Refuse a file that cannot be appended to. One that is not there is made."""
    if config.decision_log is None:
        return
    try:
        DecisionFile(config.decision_log).close()
    except OSError as error:
        raise LaunchError(
            f"--pascal-decision-log {config.decision_log}: {error.strerror}"
        ) from None


def check_drain_on_term(config: PascalConfig, server_args: Any) -> None:
    """Refuse `--pascal-drain-on-term` where no instance can end alone."""
    if not config.drain_on_term:
        return
    why = None
    if support.instances_of(server_args) == 1:
        why = "needs several instances"
    elif not config.places:
        why = "needs a policy that places requests, and no --load-balance-method"
    elif server_args.enable_dp_attention:
        why = "has no use with DP attention, whose instances end together"
    elif server_args.pp_size > 1:
        why = "does not work with pipeline parallelism, whose loop asks nobody whether to end"
    if why is not None:
        raise LaunchError(f"--pascal-drain-on-term {why}")


def idle_transport(config: PascalConfig, server_args: Any) -> str | None:
    """A KV transport that was asked for where no request moves, as one line; None if there is
    none."""
    alone = support.instances_of(server_args) == 1
    if config.kv_transport == "auto" or config.can_migrate or alone:
        return None
    return f"no request moves, so nothing uses --pascal-kv-transport {config.kv_transport}"


def idle_control(config: PascalConfig, server_args: Any) -> str | None:
    """Control sockets over TCP that nobody has, as one line; None if there are none."""
    if config.control_listen is None or support.instances_of(server_args) > 1:
        return None
    return "this server has one instance, so nothing listens at --pascal-control-listen"


def idle_racks(config: PascalConfig, server_args: Any) -> str | None:
    """Racks where all instances are on one host, as one line; None if there are none."""
    if config.racks is None or server_args.use_ray:
        return None
    return "without --use-ray all instances are on this host, so nothing uses --pascal-racks"


def idle_budget(config: PascalConfig, server_args: Any) -> str | None:
    """A thinking budget that nothing acts on, as one line; None if there is none."""
    algorithm = server_args.speculative_algorithm
    if config.default_thinking_budget is None or algorithm not in (*support.CHAINS, "NGRAM"):
        return None
    return (
        f"SGLang applies no thinking budget to drafts: with --speculative-algorithm {algorithm}, "
        "thinking ends where the model ends it"
    )


def open_to_others() -> str | None:
    """What the umask lets other users of this host do, as one line; None if it is nothing."""
    umask = os.umask(0o077)
    os.umask(umask)
    if not 0o022 & ~umask:
        return None
    return (
        f"umask {umask:04o} lets other users write to SGLang's sockets in {tempfile.gettempdir()}, "
        "and SGLang runs what it is sent there; start it with umask 0022"
    )


def check_temporary_folder(server_args: Any) -> None:
    """Sockets live there, and the address of one has a length that the system bounds."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise LaunchError(f"no temporary folder can be written to: {error.strerror}") from None
    name = LONGEST_NAME if support.instances_of(server_args) > 1 else SGLANG_SOCKET
    allowed = SOCKET_ADDRESS - len(name) - 1
    if (length := len(os.fsencode(folder))) > allowed:
        raise LaunchError(
            f"the temporary folder's name has {length} characters, and sockets in it leave room "
            f"for {allowed}; set TMPDIR to a shorter one"
        )


def check_frontend(config: PascalConfig, server_args: Any) -> None:
    """Refuse what would silently not happen: SGLang loads no plugin in extra tokenizer workers, and
    its other front ends do without the Python code we hook into."""
    ends = {
        "--pascal-brownout": config.brownout != "off",
        "--pascal-effort-budgets": config.effort_budgets is not None,
    }
    forecast = {
        "--pascal-max-ttfo": config.max_ttfo is not None,
        "--pascal-brownout": config.brownout != "off",
    }
    wanted = {
        "--pascal-pace-stream": config.pace_stream,
        "--pascal-assume-reasoning": config.assume_reasoning,
        **forecast,
        **ends,
        "--pascal-fairness": config.fairness != "off",
        "--pascal-tool-kv": config.tool_kv > 0,
    }
    served = support.first(support.FRONT_ENDS, server_args)
    if served and (name := _first(wanted)):
        raise LaunchError(f"{name} does not work with {served}")
    if (name := _first(forecast)) and not config.effective(server_args).record.schedules:
        raise LaunchError(f"{name} needs forecasts, which policy fcfs does not make")
    closes = config.default_thinking_budget is not None
    if (name := _first(ends)) and not (closes or server_args.enable_strict_thinking):
        raise LaunchError(f"{name} needs --enable-strict-thinking, which ends thinking")


def _first(flags: dict[str, bool]) -> str | None:
    """The first flag that is given."""
    return next((name for name, given in flags.items() if given), None)


def _check_model(model_path: str) -> None:
    """A folder must hold a readable config.json; anything else is left to SGLang and the hub."""
    path = Path(model_path)
    if not path.exists():
        if path.is_absolute() or model_path.startswith((".", "~")):
            raise LaunchError(f"model {model_path!r} does not exist")
        return
    if not path.is_dir():
        return
    config = path / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LaunchError(f"model folder {model_path!r} has no config.json") from None
    except (OSError, ValueError) as error:
        raise LaunchError(f"cannot read {config}: {error}") from error


def _check_port(host: str, port: int) -> None:
    """Fail before the model is loaded, not after."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise LaunchError(f"port {port} on {host} is already in use") from None
            raise LaunchError(f"cannot listen on {host}:{port}: {error.strerror}") from None
        except OverflowError:
            raise LaunchError(f"port {port} is not between 0 and 65535") from None


def one_line(error: Exception) -> str | None:
    """The line for an error the user can act on; None for one that deserves its traceback."""
    if isinstance(error, OSError | ValueError | RuntimeError | NotImplementedError) and str(error):
        return " ".join(str(error).split())[:400]
    return None
