"""Ports of the tests. Each worker of pytest-xdist has its own, so that what two of them start at
once never meets, however long it takes between the choice of a port and its use.

The others, below those that the system gives to outgoing connections (32768), are SGLang's, which
draws of 22000 to 29999 by itself, and those of the servers that commands of `evals` start, 30000 to
31999. Tests that use these, or Ray's, run in one worker (`tests.workers`): where a shell starts a
server, SGLang can be told a port for one instance (`not_drawn`), and for several it cannot.
"""

from __future__ import annotations

import itertools
import os

from evals.load.server import is_free

MOST_WORKERS = 4
TESTS, MOONCAKE = range(18_000, 22_000), range(15_000, 17_000)
RAY_WORKERS = range(10_100, 10_200)
# Of a worker's: those that tests ask for. With DP attention a server takes eight more from the
# 233rd after its own on.
ASKED_FOR, BESIDE = 200, 450
# Runs of several checkouts begin in different places.
_turns = itertools.count(os.getpid())


def share(whole: range) -> range:
    """This worker's part."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    assert count <= MOST_WORKERS, f"ports are for {MOST_WORKERS} workers at most"
    size = len(whole) // count
    return whole[worker * size : (worker + 1) * size]


def free_port() -> int:
    """A port that nobody has, and that is not given out again soon."""
    ours = share(TESTS)[:ASKED_FOR]
    for turn in itertools.islice(_turns, ASKED_FOR):
        if is_free(port := ours[turn % ASKED_FOR]):
            return port
    raise RuntimeError(f"no free port in {ours}")


def not_drawn() -> list[str]:
    """Flags for a server of one instance: SGLang draws no port."""
    return ["--nccl-port", str(free_port())]


def drawn() -> range:
    """What SGLang is to draw of by itself, where a test can tell it."""
    return share(TESTS)[BESIDE:]


def environment() -> dict[str, str]:
    """What forks of `warm_servers` draw of, and what the Mooncake Transfer Engine does: its
    variables are spelled so."""
    ours, mooncake = drawn(), share(MOONCAKE)
    return {
        "TEST_PORTS": f"{ours[0]}-{ours[-1]}",
        "MC_MIN_PRC_PORT": str(mooncake[0]),
        "MC_MAX_PRC_PORT": str(mooncake[-1]),
    }
