"""What SGLang's own scheduler does, once for all tests of levels and flags."""

import pytest

from tests.engine.inproc.bed import run
from tests.engine.inproc.test_plain import requests

SHORT = ["--max-total-tokens", "400"]
WATCH = "tests.engine.inproc.watch:batches"


@pytest.fixture(scope="session")
def stock(tiny_model):
    """Without memory to spare."""
    return run(tiny_model, requests(24), flags=SHORT, each_pass=WATCH)
