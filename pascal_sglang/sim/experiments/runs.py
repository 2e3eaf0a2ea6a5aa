"""Many independent runs on all cores, with a progress bar."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from pascal_sglang.sim.arms import Arm
from pascal_sglang.sim.cluster import Progress, Setup, simulate
from pascal_sglang.sim.figures import figures
from pascal_sglang.sim.workload import PLAIN, Shape, Workload, draw

BAR = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run: an arm under a drawn workload, or under one that is given.

    load, rate: the name of the load and its requests per second. shape: of a drawn workload.
    scenario: what the workload is called, if not by its source.
    """

    setup: Setup
    arm: Arm
    source: str
    load: str
    rate: float
    requests: int
    seed: int
    shape: Shape = PLAIN
    scenario: str = ""
    workload: Workload | None = None


def run(task: Task, progress: Progress | None = None) -> dict[str, Any]:
    """The figures of one run, with what identifies it."""
    workload = task.workload or draw(task.source, task.requests, task.rate, task.seed, task.shape)
    outcome = simulate(task.setup, task.arm, workload, progress)
    return {
        "arm": task.arm.name,
        "source": task.scenario or task.source,
        "load": task.load,
        "rate": task.rate,
        "seed": task.seed,
        **figures(task.setup, workload, outcome),
    }


def run_all(
    tasks: Sequence[Task],
    processes: int | None = None,
    way: Callable[[Task], dict[str, Any]] = run,
) -> list[dict[str, Any]]:
    """All runs, in the order of `tasks`. way: how each is run."""
    if len(tasks) == 1 and way is run:
        bar = Bar(tasks[0].requests, "requests")
        alone = [run(tasks[0], bar.at)]
        bar.end()
        return alone
    bar = Bar(len(tasks), "runs")
    if processes == 1 or len(tasks) == 1:
        found = []
        for number, task in enumerate(tasks, start=1):
            found.append(way(task))
            bar.at(number)
    else:
        # Spawned, not forked: what the parent has running must not come along.
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            found = []
            for number, result in enumerate(pool.imap(way, tasks), start=1):
                found.append(result)
                bar.at(number)
    bar.end()
    return found


class Bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, unit: str, out: TextIO = sys.stderr) -> None:
        self.total = max(1, total)
        self.unit = unit
        self.out = out
        self._live = out.isatty()
        self._began = self._shown = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.1 if self._live else 10.0) and done < self.total:
            return
        self._shown = now
        passed = now - self._began
        left = passed / done * (self.total - done) if done else 0.0
        filled = BAR * done // self.total
        text = (
            f"[{'#' * filled}{'.' * (BAR - filled)}] {done}/{self.total} {self.unit}, "
            f"{passed:.0f} s, {left:.0f} s left"
        )
        self.out.write(f"\r{text:<78}" if self._live else text + "\n")
        self.out.flush()

    def end(self) -> None:
        if self._live:
            self.out.write("\n")
