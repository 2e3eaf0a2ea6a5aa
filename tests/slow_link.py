"""Carries frames between two network devices, each way, late, and not all of them.

    python -S slow_link.py DEVICE DEVICE SECONDS PART_LOST

Prints "ready" and goes on until it is killed.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

# Of <linux/if_packet.h> and <linux/if_ether.h>.
SOL_PACKET, PACKET_VNET_HDR, PACKET_OUTGOING, ETH_P_ALL = 263, 15, 4, 3
MOST_WAITING = 1000  # Frames, as netem's.
FRAME_BYTES = 1 << 17  # A frame of segments that a device is to cut has up to 64 KiB.


def _open(device: str) -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    # Checksums and segments that are left to a device stay so.
    one.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    one.bind((device, 0))
    return one


def carry(devices: tuple[str, str], delay_s: float, loss: float) -> None:
    """loss: the part of frames, 0 to 1."""
    first, second = map(_open, devices)
    there = {first: second, second: first}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    print("ready", flush=True)
    while True:
        due = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for one in select.select(list(there), [], [], due)[0]:
            with suppress(OSError):  # The link is cut.
                frame, address = one.recvfrom(FRAME_BYTES)
                kept = address[2] != PACKET_OUTGOING and random.random() >= loss
                if kept and len(waiting) < MOST_WAITING:
                    waiting.append((time.monotonic() + delay_s, there[one], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, one, frame = waiting.popleft()
            with suppress(OSError):
                one.send(frame)


if __name__ == "__main__":
    carry((sys.argv[1], sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
