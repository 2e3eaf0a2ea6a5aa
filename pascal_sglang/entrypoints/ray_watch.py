"""The end of Ray's scheduler actors, told as the controller hears of a process's: by a descriptor.

Ray knows it from the call that an actor serves in, which never returns while the actor lives.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pascal_sglang.cluster.loop_errors import LoopErrors

logger = logging.getLogger(__name__)

# A wait for Ray, in seconds; it is begun anew for as long as an actor lives.
WAIT_S = 60.0
# Until it is asked again after an error.
AGAIN_S = 1.0


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
        """Should it live on, it ends once Ray reaches it."""
        try:
            ray.kill(self.actor)
        except Exception:  # The others of its instance are to be ended, too.
            logger.exception("pascal_sglang: Ray did not end an actor")


def watch(
    actors: Sequence[Any], calls: Sequence[Any], pids: Sequence[int], errors: LoopErrors
) -> list[Watched]:
    """One for each actor, with the call that it serves in and its process id. errors: takes those
    of Ray's."""
    watched, bells = [], {}
    for actor, call, pid in zip(actors, calls, pids, strict=True):
        sentinel, bell = os.pipe()
        watched.append(Watched(actor, pid, sentinel))
        bells[call] = (watched[-1], bell)
    threading.Thread(target=_wait, args=(bells, errors), name="ray_deaths", daemon=True).start()
    return watched


def _wait(bells: dict[Any, tuple[Watched, int]], errors: LoopErrors) -> None:
    while bells:
        try:
            ended, _ = ray.wait(list(bells), num_returns=1, timeout=WAIT_S)
        except Exception as error:
            if not ray.is_initialized():
                return
            errors.note("waiting for the end of actors", error)
            time.sleep(AGAIN_S)
            continue
        for call in ended:
            watched, bell = bells.pop(call)
            try:
                ray.get(call)
            except Exception as error:
                watched.exitcode = type(error).__name__
            os.write(bell, b".")


def last_words(said: str) -> str:
    """Of an actor that failed at its start: what it failed with, which SGLang says after all of its
    traceback. Anything else as it is."""
    if "creation task" not in said:
        return said
    return f"an instance does not start: {said.strip().splitlines()[-1]}"
