"""The servers of a check: begun before they are needed, side by side, and shared by its parts."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals import arms
from evals.arms import STOCK_ON_CPU, Arm, Plan
from evals.load.server import ArmError, Server

# A server by all that tells it from others: its command line and environment.
Key = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]


def key_of(arm: Arm, plan: Plan, model: Path) -> Key:
    env = arms.command_env(arm, plan)
    return tuple(arms.command_line(arm, plan, model)), tuple(sorted(env.items()))


def two_instances(name: str, plan: Plan, config: Mapping[str, Any]) -> Arm:
    """A server with two instances on one device: SGLang's own command under our configuration,
    which has settings that no flag gives."""
    env = {"PASCAL_SGLANG_CONFIG": json.dumps({**config, "gpus": 1})}
    if "cpu" in plan.flags:
        env |= {**STOCK_ON_CPU, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    return Arm(name=name, command="stock", role="candidate", flags=("--dp-size", "2"), env=env)


@dataclass(slots=True)
class _Begun:
    """failed: why it does not serve, once that is known."""

    server: Server
    deadline: float
    up: bool = False
    failed: str | None = None


@dataclass(slots=True)
class Servers:
    """Servers that were begun and have not been ended; as a context, it ends all of them."""

    _begun: dict[Key, _Begun] = field(default_factory=dict)
    _ends: dict[Key, Future[None]] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all_but(())
        self._pool.shutdown()

    def __contains__(self, key: Key) -> bool:
        return key in self._begun

    def begin(self, arm: Arm, plan: Plan, model: Path) -> None:
        """Start it unless it is there. It has the plan's time until it has to answer."""
        key = key_of(arm, plan, model)
        if key not in self._begun:
            # Each process of a server would import SGLang by itself, which takes two cores minutes.
            server = arms.serve(arm, plan, model, forked="cpu" in plan.flags)
            self._begun[key] = _Begun(server, time.monotonic() + plan.start_timeout_s)

    def wait(self, key: Key) -> Server:
        """The server, once it answers. Raises: ArmError for one that does not, each time."""
        begun = self._begun[key]
        if begun.failed is None and not begun.up:
            try:
                begun.server.wait_ready(max(0.0, begun.deadline - time.monotonic()))
                begun.up = True
            except ArmError as error:
                begun.failed = str(error)
                begun.server.stop()
        if begun.failed is not None:
            raise ArmError(begun.failed)
        return begun.server

    def settle(self) -> None:
        """Wait until no server starts or ends: what is measured then is not disturbed by it."""
        for key in list(self._begun):
            try:
                self.wait(key)
            except ArmError:
                continue  # Told to the part that wants it.
        for ended in self._ends.values():
            ended.result()
        self._ends.clear()

    def end_all_but(self, wanted: Collection[Key]) -> None:
        """End the servers that nothing wants any more, beside what goes on."""
        for key in [key for key in self._begun if key not in wanted]:
            begun = self._begun.pop(key)
            if begun.failed is None:
                self._ends[key] = self._pool.submit(begun.server.stop)
