"""Invariants: requests, tokens and memory are conserved, in every run."""

from __future__ import annotations

from collections.abc import Sequence

from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.request import Job
from pascal_sglang.sim.workload import Workload


class Books:
    """Opened by every arrival, closed by every end, balanced after the run.

    `Memory` checks by itself, at every change, that nothing is held twice or beyond capacity.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.opened = 0
        self.closed = 0
        self.tokens = 0
        self._open: set[int] = set()

    def opens(self, job: Job) -> None:
        if job.index in self._open:
            raise RuntimeError(f"request {job.index} arrived twice")
        self._open.add(job.index)
        self.opened += 1

    def closes(self, job: Job) -> None:
        """A request ended: once, after all of its tokens, every answering one of them shown."""
        if job.index not in self._open:
            raise RuntimeError(f"request {job.index} ended twice, or before it came")
        self._open.remove(job.index)
        self.closed += 1
        self.tokens += job.total_tokens
        if job.total_tokens != job.reasoning + job.answer or job.pacer.delivered != job.answer:
            raise RuntimeError(
                f"request {job.index} ended with {job.total_tokens} tokens, "
                f"{job.pacer.delivered} of them shown, instead of {job.reasoning} and {job.answer}"
            )
        if not job.arrival <= job.first_token <= job.reasoning_end <= job.first_answer:
            raise RuntimeError(f"request {job.index} has its times out of order")

    def close(self, instances: Sequence[Instance], moves: int) -> None:
        """Everything has happened: nothing may be left, and nothing missing."""
        wanted = len(self.workload), self.workload.output_tokens
        if (self.closed, self.tokens) != wanted or self._open:
            raise RuntimeError(
                f"{self.closed} requests ended with {self.tokens} tokens instead of "
                f"{wanted[0]} with {wanted[1]}; {len(self._open)} are stuck"
            )
        generated = sum(instance.tokens for instance in instances)
        if generated != self.tokens:
            raise RuntimeError(f"{generated} tokens generated, {self.tokens} of them for requests")
        for instance in instances:
            left = instance.memory.held, instance.memory.host, len(instance.batch)
            if any(left) or instance.thinking or instance.readers.answering or instance.fresh:
                raise RuntimeError(f"instance {instance.index} is left with {left}")
        if moves:
            raise RuntimeError(f"{moves} moves never ended")
