"""Invariants: requests, tokens and memory are conserved, in every run."""

from __future__ import annotations

from collections.abc import Sequence

from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.request import SimRequest
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

    def opens(self, request: SimRequest) -> None:
        if request.index in self._open:
            raise RuntimeError(f"request {request.index} arrived twice")
        self._open.add(request.index)
        self.opened += 1

    def closes(self, request: SimRequest) -> None:
        """A request ended: once, after all of its tokens, every answering one of them shown."""
        if request.index not in self._open:
            raise RuntimeError(f"request {request.index} ended twice, or before it came")
        self._open.remove(request.index)
        self.closed += 1
        self.tokens += request.total_tokens
        if (
            request.total_tokens != request.reasoning + request.answer
            or request.pacer.delivered != request.answer
        ):
            raise RuntimeError(
                f"request {request.index} ended with {request.total_tokens} tokens, "
                f"{request.pacer.delivered} of them shown, instead of {request.reasoning} and "
                f"{request.answer}"
            )
        if (
            not request.arrival
            <= request.first_token
            <= request.reasoning_end
            <= request.first_answer
        ):
            raise RuntimeError(f"request {request.index} has its times out of order")

    def close(self, instances: Sequence[Instance], migrations: int) -> None:
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
        if migrations:
            raise RuntimeError(f"{migrations} moves never ended")
