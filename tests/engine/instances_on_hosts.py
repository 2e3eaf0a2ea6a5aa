"""`sglang` whose instances have their KV sockets on hosts of their own (`tests.hosts`): those whose
network namespaces `TEST_HOSTS` names, separated by commas. All else stays on this host.

Each process says when a pass has spent longer on moves than before.
"""

import ctypes
import os
import sys
import time

from pascal_sglang.cluster.migration_source import Terms
from pascal_sglang.cluster.transport.mooncake import Mooncake
from pascal_sglang.engine.migration import outgoing
from pascal_sglang.engine.migration.manager import Migrations
from pascal_sglang.instances import own_instance

CLONE_NEWNET = 0x40000000
sound_init, sound_step = Mooncake.__init__, Migrations.step
longest = 0.0


def on_own_host(transport, *args, **more):
    """Also all sockets that this thread opens from now on, and the threads that it starts."""
    namespace = os.environ["TEST_HOSTS"].split(",")[own_instance()]
    with open(namespace, "rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), namespace)
    sound_init(transport, *args, **more)


def step(migrations, running):
    global longest
    began = time.perf_counter()
    sound_step(migrations, running)
    if (took := time.perf_counter() - began) > max(longest, 0.005):
        longest = took
        print(f"\nMOVES TOOK {1e3 * took:.1f} ms of a pass", file=sys.stderr, flush=True)


Mooncake.__init__, Migrations.step = on_own_host, step
# So that a test need not wait long.
outgoing.QUIET_S = 1.0
Terms.__init__.__kwdefaults__["patience_s"] = 0.5

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
