"""Servers and models shared by the whole session: each costs half a minute to start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pascal_sglang import older_sglang
from pascal_sglang.seams import installed
from tests import ports, workers
from tests.harness import PASCAL, STOCK, TINY_FLAGS, WARM_ENV, Server, begin_imports, warm_servers

# A busy machine is no fault.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


# For what this process starts, and for the Mooncake Transfer Engine in it.
os.environ |= ports.environment()

# Tests of single classes of ours have no plugin that does it.
older_sglang.install(everywhere=True)


def pytest_report_header() -> str:
    return f"sglang {installed().version} from {installed().folder}"


def pytest_configure(config: pytest.Config) -> None:
    """One process forks the servers of all workers. It ends with this one."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ[WARM_ENV] = warm_servers()
        if any("unit" not in Path(asked.partition("::")[0]).parts for asked in config.args):
            begin_imports()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: workers.place(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return workers.scheduler(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with think tokens, float32."""
    from pascal_sglang.demo.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def pascal_server(tiny_model: Path) -> Iterator[Server]:
    """The tiny model under our launcher, with SGLang's strict memory checks on."""
    strict = {
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    }
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS]
    with Server(PASCAL, flags, strict, warm=True) as server:
        yield server
        server.stop(signal.SIGTERM)


@pytest.fixture(scope="session")
def stock_server(tiny_model: Path) -> Iterator[Server]:
    """The tiny model under SGLang's own launcher; we are installed but nobody asked for us."""
    platform = {"SGLANG_PLATFORM": "pascal_cpu"}
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS]
    with Server(STOCK, flags, platform, warm=True) as server:
        yield server
        server.stop(signal.SIGTERM)
