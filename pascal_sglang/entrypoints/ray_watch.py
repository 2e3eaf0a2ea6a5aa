"""The end of Ray's scheduler actors, told as the controller hears of a process's: by a descriptor.

Ray knows it from the call that an actor serves in, which never returns while the actor lives.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

logger = logging.getLogger(__name__)

# A wait for Ray, in seconds; it is begun anew for as long as an actor lives.
WAIT_S = 60.0


@dataclass(slots=True, eq=False)
class Watched:
    """An actor in the place of a process. sentinel: becomes readable when it has ended; `exitcode`
    then says how, None if its call returned."""

    actor: Any
    pid: int
    sentinel: int
    exitcode: str | None = None

    def join(self) -> None:
        """It has ended when its sentinel says so."""

    def kill(self) -> None:
        ray.kill(self.actor)


def watch(actors: Sequence[Any], calls: Sequence[Any], pids: Sequence[int]) -> list[Watched]:
    """One for each actor, with the call that it serves in and its process id."""
    watched, bells = [], {}
    for actor, call, pid in zip(actors, calls, pids, strict=True):
        sentinel, bell = os.pipe()
        watched.append(Watched(actor, pid, sentinel))
        bells[call] = (watched[-1], bell)
    threading.Thread(target=_wait, args=(bells,), name="ray_deaths", daemon=True).start()
    return watched


def _wait(bells: dict[Any, tuple[Watched, int]]) -> None:
    while bells:
        try:
            ended, _ = ray.wait(list(bells), num_returns=1, timeout=WAIT_S)
        except Exception:
            if ray.is_initialized():
                logger.exception("pascal_sglang: actors that die from now on are not noticed")
            return
        for call in ended:
            watched, bell = bells.pop(call)
            try:
                ray.get(call)
            except Exception as error:
                watched.exitcode = type(error).__name__
            os.write(bell, b".")
