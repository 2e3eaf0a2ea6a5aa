"""What stock SGLang answers, once for all engine tests."""

import functools
import os
import sys
from pathlib import Path

import pytest

from pascal_sglang.config import CONFIG_ENV, PascalConfig
from tests.engine.inproc.conftest import is_before
from tests.engine.inproc.models import build
from tests.engine.load import run
from tests.harness import TINY_FLAGS, Server

SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
LATE = (sys.executable, str(Path(__file__).with_name("late_device.py")), "serve")
if is_before("0.5.23"):
    LATE = SERVE  # What a step copies off the device is not in one place there.
# Of what others show nearly as well.
MORE = pytest.mark.skipif("TEST_MORE" not in os.environ, reason="TEST_MORE is not set")


@pytest.fixture(scope="session")
def reference(stock_server):
    """Output ids and finish reasons with memory to spare."""
    return run(stock_server)[0]


@pytest.fixture(scope="session")
def serve(tiny_model):
    """Starts the tiny model, or another one, under a configuration, with SGLang's strict memory
    checks on, as a fork. more: of its environment, but for what SGLang reads on import."""

    def start(settings, flags, command=SERVE, *, model=tiny_model, **more):
        env = {
            CONFIG_ENV: PascalConfig(**settings).to_json(),
            "SGLANG_PLATFORM": "pascal_cpu",
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
            **more,
        }
        whole = ["--model-path", str(model), *TINY_FLAGS, *flags]
        return Server(command, whole, env, warm=True)

    return start


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """The folder of a tiny model of a family, made once."""

    @functools.cache
    def made(name):
        return build(name, tmp_path_factory.mktemp(name) / "model")

    return made
