"""One side of a KV transport on a host of its own, told what to do by lines of JSON.

    python tests/kv_host.py LISTEN BYTES

Says its address first. Then each line `[what, ...]` is answered by one:

- `["open", address]`, `["close", address]`: a peer.
- `["put", address, offset, size, letter, seconds]`: write so many bytes of a letter, and give up
  after so long. Answers `[done, seconds, longest]`: whether it arrived (None: given up), how long
  that took, and the longest call of the thread that asked for it.
- `["rest", seconds]`: whether what was given up is at rest after so long at most.
- `["read", offset, size]`: how often each letter is there.
- `["steal", session, address, size]`: what a stranger does with the engine alone; answers what its
  write and its read came to, and what it has read.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import time
from collections import Counter
from typing import Any

from pascal_sglang.cluster import transport
from pascal_sglang.cluster.transport import Write

LOOK_S = 0.002


def timed(longest: list[float], call: Any) -> Any:
    began = time.perf_counter()
    found = call()
    longest.append(time.perf_counter() - began)
    return found


def put(
    own: transport.Transport,
    given_up: list[Write],
    address: str,
    offset: int,
    size: int,
    letter: str,
    seconds: float,
) -> list[Any]:
    longest: list[float] = []
    write = timed(longest, lambda: own.room(address, offset, size))
    write.memory[:] = letter.encode() * size
    began = time.perf_counter()
    timed(longest, write.begin)
    done = timed(longest, write.query)
    while done is None and time.perf_counter() - began < seconds:
        time.sleep(LOOK_S)
        done = timed(longest, write.query)
    took = time.perf_counter() - began
    if done is None:
        timed(longest, write.abandon)
        given_up.append(write)
    return [done, took, max(longest)]


def rest(given_up: list[Write], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not all(write.at_rest for write in given_up):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
        for write in given_up:
            write.abandon()
    given_up.clear()
    return True


def steal(session: str, address: int, size: int) -> list[Any]:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    memory = mmap.mmap(-1, size)
    memory[:] = b"s" * size
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    wrote = engine.transfer_sync_write(session, at, address, size)
    memory[:] = b"." * size
    read = engine.transfer_sync_read(session, at, address, size)
    return [wrote, read, Counter(memory[:].decode("latin-1"))]


def main(listen: str, size: int) -> None:
    own = transport.make("mooncake", size, size, listen=listen)
    given_up: list[Write] = []
    print(json.dumps(own.address), flush=True)
    for line in sys.stdin:
        what, *rest_of = json.loads(line)
        answer: Any = None
        if what == "open":
            own.open_peer(*rest_of)
        elif what == "close":
            own.close_peer(*rest_of)
        elif what == "put":
            answer = put(own, given_up, *rest_of)
        elif what == "rest":
            answer = rest(given_up, *rest_of)
        elif what == "read":
            offset, length = rest_of
            found = own.receive_buffer[offset : offset + length]
            answer = Counter(bytes(found).decode("latin-1"))
        elif what == "steal":
            answer = steal(*rest_of)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
