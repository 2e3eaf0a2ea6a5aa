"""Which worker of pytest-xdist runs which tests, under `--dist loadfile`: a file's stay together,
and so do those of files that share servers. What takes longest begins first; the many short files
of `unit` fill up what is left, so that the workers end together.
"""

from __future__ import annotations

from typing import Any

# By their folder and name.
GROUPS = (
    # Ports that SGLang or a command of `evals` draws (`tests.ports`), and `pascal_server`.
    (
        *("e2e/test_parallel", "engine/test_ray", "e2e/test_entry_points"),
        *("e2e/test_clients", "e2e/test_evals_accuracy", "engine/test_phases"),
        *("e2e/test_status", "e2e/test_monitoring", "e2e/test_gateway"),
        *("engine/test_forecasts", "engine/test_run_time_config"),
    ),
    ("engine/test_migration",),
    ("engine/test_migration_states",),
    ("e2e/test_refusals",),
    ("engine/inproc/test_speculative",),
    ("engine/test_chaos",),
    ("engine/test_pressure",),
    ("e2e/test_gpu_check",),
    ("engine/test_soak",),
    ("engine/test_families_server",),
    ("e2e/test_evals_serving",),
    ("engine/test_crowded_pair",),
    ("engine/test_priorities",),
    ("engine/inproc/test_request_kinds",),
    ("e2e/test_fcfs_is_stock",),
    ("engine/test_failures",),
    # Of those that come last.
    ("unit/test_sim",),
    ("unit/test_sglang_releases",),
)
_group_of = {file: number for number, files in enumerate(GROUPS) for file in files}


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")


def place(nodeid: str) -> tuple[bool, int]:
    """Where a test stands among all: other servers come after those above, `unit` comes last."""
    file = _file(nodeid)
    return file.startswith("unit/"), _group_of.get(file, len(GROUPS))


def scheduler(config: Any, log: Any) -> Any:
    """Of pytest-xdist."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = _file(nodeid)
            return str(_group_of.get(file, file))

    config.option.loadscopereorder = False  # By their number of tests, that is.
    return Scheduling(config, log)
