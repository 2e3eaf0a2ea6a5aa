"""The device of `tests.engine.late_device` under a scheduler of `bed.run`: `prepare` hooks."""

import random

from tests.engine.inproc import loopback

# Chances that the device takes no copy.
FAILS = 0.04
PAUSES = {"prepare": "tests.engine.inproc.late:prepare"}
MOVES = {**loopback.HOOKS, "prepare": "tests.engine.inproc.late:prepare_moves"}
FAILING_MOVES = {
    "prepare": "tests.engine.inproc.late:prepare_failing",
    "each_pass": "tests.engine.inproc.late:failing_moves",
}

_DICE = random.Random(5)
_SERVES = []


def prepare():
    from tests.engine import late_device

    assert late_device.host_copies.copy_stream_of(None).deferred


def prepare_moves():
    prepare()
    loopback.prepare()


def prepare_failing():
    """Once it serves, the device takes some copies not, and has not pinned what moves use."""
    import torch

    from pascal_sglang.engine.kv import host_copies
    from tests.engine.late_device import LateCopies

    prepare_moves()
    sound_run, sound_reserve = LateCopies.run, host_copies.HostCopies.reserve

    def run(stream, copy, locations, *, after_steps):
        if _SERVES and _DICE.random() < FAILS:
            raise torch.OutOfMemoryError("no memory, on purpose")
        return sound_run(stream, copy, locations, after_steps=after_steps)

    def reserve(copies, entries):
        sound_reserve(copies, entries)
        copies._pins = True

    LateCopies.run, host_copies.HostCopies.reserve = run, reserve
    host_copies.pin = lambda at, size: 2


def failing_moves(scheduler, reqs, passes):
    _SERVES.append(passes)
    loopback.moves(scheduler, reqs, passes)
