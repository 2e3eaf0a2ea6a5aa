"""`python -m pascal_sglang.launch_server`: SGLang's server under a pascal policy.

Takes every flag of `sglang serve` and the `--pascal-*` flags. Bad input ends with one line on
stderr and exit code 2; nothing is left running.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Sequence

import psutil

from pascal_sglang.cluster.private_folder import remove_all
from pascal_sglang.config import (
    CONFIG_ENV,
    ConfigError,
    LaunchError,
    PascalConfig,
    add_flags,
    from_flags,
)
from pascal_sglang.entrypoints import sglang_flags
from pascal_sglang.entrypoints.preflight import (
    OneLineParser,
    check_arguments,
    check_control,
    check_decision_log,
    check_drain_on_term,
    check_frontend,
    check_given,
    check_machine,
    check_migrations,
    check_temporary_folder,
    idle_budget,
    idle_control,
    idle_racks,
    idle_transport,
    one_line,
    open_to_others,
)

PROG = "pascal_sglang"
EXIT_BAD_INPUT = 2


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split `argv` into our options and SGLang's arguments; raises `LaunchError`."""
    parser = OneLineParser(
        prog=f"python -m {PROG}.launch_server", add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="show all flags and exit")
    parser.add_argument("--version", action="version", version=versions())
    parser.add_argument(
        "--demo",
        action="store_true",
        help="serve the demo model, SmolLM2-135M-Instruct made to think, on this machine's CPU",
    )
    add_flags(parser)
    options, rest = parser.parse_known_args(argv)
    ours = [option for action in parser._actions for option in action.option_strings]
    for word in rest:
        name = word.partition("=")[0]
        if name.startswith("--pascal-"):
            parser.error(f"unknown flag {name}{sglang_flags.did_you_mean(name, ours)}")
    if options.help:
        parser.print_help()
        print("\nEvery flag of sglang serve:\n", flush=True)
    elif unknown := sglang_flags.typo(rest, ours):
        parser.error(unknown)
    return options, rest


def versions() -> str:
    """Ours and SGLang's, without importing it."""
    found = []
    for name in (PROG, "sglang"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
    return ", ".join(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it stops; the exit code."""
    try:
        options, rest = parse(sys.argv[1:] if argv is None else argv)
        config = from_flags(options)
        if not options.help:
            check_given(rest, has_model=options.demo)
        if options.demo:
            from pascal_sglang.demo.serve import demo_arguments

            config, rest = demo_arguments(config, rest)
        if any(flag.partition("=")[0] == "--load-balance-method" for flag in rest):
            config = dataclasses.replace(config, placement="sglang")
        if options.help:
            rest = ["--help"]
        return serve(config, rest)
    except (LaunchError, ConfigError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def serve(config: PascalConfig, sglang_argv: list[str]) -> int:
    """Start SGLang with our plugin active in every process and block until it ends."""
    # On a CPU, SGLang's imports warn about every quantisation kernel that is not there.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"sglang\.")
    os.environ[CONFIG_ENV] = config.to_json()
    _admit_plugin(os.environ)
    check_machine(sglang_argv)

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import kill_process_tree

    from pascal_sglang import plugin

    load_plugins()
    if not plugin.is_installed():
        raise LaunchError("SGLang did not load the plugin; is pascal_sglang installed by pip?")
    server_args = check_arguments(sglang_argv)
    support = config.support(server_args)
    config.require_level(support)
    check_frontend(config, server_args)
    check_migrations(config, server_args)
    check_control(config, server_args)
    check_decision_log(config)
    check_drain_on_term(config, server_args)
    check_temporary_folder(server_args)
    print(config.banner(), file=sys.stderr, flush=True)
    print(f"{PROG}: level {support} by the arguments", file=sys.stderr, flush=True)
    for warning in (
        open_to_others(),
        idle_transport(config, server_args),
        idle_control(config, server_args),
        idle_racks(config, server_args),
        idle_budget(config, server_args),
    ):
        if warning is not None:
            print(f"{PROG}: warning: {warning}", file=sys.stderr, flush=True)
    try:
        run_server(server_args)
        return 0
    except KeyboardInterrupt:
        print(f"{PROG}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        raise LaunchError(f"cannot serve {server_args.model_path!r}: {line}") from error
    finally:
        if psutil.Process().children():
            kill_process_tree(os.getpid(), include_parent=False)
        remove_all()


def _admit_plugin(environ: os._Environ[str]) -> None:
    """`SGLANG_PLUGINS` is a whitelist; who starts this launcher wants us on it."""
    allowed = environ.get("SGLANG_PLUGINS")
    if allowed and "pascal" not in {name.strip() for name in allowed.split(",")}:
        environ["SGLANG_PLUGINS"] = f"{allowed},pascal"


if __name__ == "__main__":
    sys.exit(main())
