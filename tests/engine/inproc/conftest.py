"""What SGLang's own scheduler does, once for all tests of levels and flags."""

import pytest

from pascal_sglang.seams import installed, version_order
from tests.engine.inproc.bed import run
from tests.engine.inproc.test_plain import requests

SHORT = ["--max-total-tokens", "400"]
WATCH = "tests.engine.inproc.watch:batches"


def since(release, why):
    """What an older release of SGLang does not have here (docs/seams.md)."""
    older = version_order(installed().version) < version_order(release)
    return pytest.mark.skipif(older, reason=why)


HYBRID_POOLS = since("0.5.22", "hybrid pools stay in SGLang's order there")
PAGES = since("0.5.22", "the reference platform has pages of one token there")


@pytest.fixture(scope="session")
def stock(tiny_model):
    """Without memory to spare."""
    return run(tiny_model, requests(24), flags=SHORT, each_pass=WATCH)


SAMPLED_DRAFTS = since("0.5.23", "what samples drafts is in a compiled package there")
