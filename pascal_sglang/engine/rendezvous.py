"""Where the ranks of an instance meet: on this host's loopback, if they are all on this host.

`torch.distributed` lets its store listen on every interface, whatever address it is given, and Gloo
listens at the address that the host's name stands for. Neither asks who connects.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from sglang.srt.runtime_context import get_parallel
from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
INIT_METHOD_ENV = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
GLOO_ENV = "GLOO_SOCKET_IFNAME"
JOIN = timedelta(seconds=60)


def meet_on_loopback(port: int) -> TCPStore | None:
    """Let this instance's process group, made later, meet at `port` of 127.0.0.1. On its first
    rank the store listens from here on; torch finds it by its port while the result is kept.

    Nothing changes where the operator, or SGLang under Ray, says where to meet.
    """
    parallel = get_parallel()
    if parallel.nnodes > 1 or parallel.dist_init_addr or os.environ.get(INIT_METHOD_ENV):
        return None
    os.environ[INIT_METHOD_ENV] = f"tcp://{LOOPBACK}:{port}"
    os.environ.setdefault(GLOO_ENV, "lo")
    if parallel.tp_rank or parallel.pp_rank:
        return None
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError:  # The port is taken: SGLang says so in its own words.
        return None
    return TCPStore(
        LOOPBACK,
        port,
        None,
        is_master=True,
        timeout=JOIN,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
