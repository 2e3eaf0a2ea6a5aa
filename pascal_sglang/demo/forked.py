"""A server on a CPU whose processes are forks of one: SGLang is imported once for all of them.

    python -m pascal_sglang.demo.forked MODULE [FLAGS]

MODULE is what would start the server, `sglang.launch_server` or ours. For a CPU alone: what an
accelerator's driver holds does not survive a fork.
"""

from __future__ import annotations

import runpy
import sys

from pascal_sglang.demo import servers
from pascal_sglang.entrypoints.preflight import check_machine


def main() -> None:
    check_machine([*sys.argv[2:], "--device", "cpu"])
    servers.preload()
    servers.freeze()
    servers.fork_workers()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main()
