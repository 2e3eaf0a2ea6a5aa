"""What SGLang's own scheduler does, once for all tests of levels and flags."""

import pytest

from pascal_sglang.seams import installed, version_order
from tests.engine.inproc.bed import run
from tests.engine.inproc.test_plain import requests

SHORT = ["--max-total-tokens", "400"]
WATCH = "tests.engine.inproc.watch:batches"


def is_before(release):
    return version_order(installed().version) < version_order(release)


def since(release, why):
    """What an older release of SGLang does not have here (docs/seams.md)."""
    return pytest.mark.skipif(is_before(release), reason=why)


HYBRID_POOLS = since("0.5.22", "hybrid pools stay in SGLang's order there")
PAGES = since("0.5.22", "the reference platform has pages of one token there")
HOST_POOL = since("0.5.22", "the hierarchical cache takes streams of a CUDA device there")
LATE_DEVICE = since("0.5.23", "the late device of the tests stands in for what SGLang has since")
SAMPLED_DRAFTS = since("0.5.23", "what samples drafts is in a compiled package there")


def arms(table):
    """The names of a table of flags, for parameters: those with pages where there are some."""
    return [pytest.param(name, marks=PAGES) if "pages" in name else name for name in table]


@pytest.fixture(scope="session")
def stock(tiny_model):
    """Without memory to spare."""
    return run(tiny_model, requests(24), flags=SHORT, each_pass=WATCH)
