"""Where copies of KV run: at once on a CPU, on a stream of their own on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


class CopyStream:
    """Runs copies at once. deferred: whether a copy may still run when `run` has returned."""

    deferred = False

    def run(self, copy: Callable[[], None], locations: torch.Tensor, *, after_steps: bool) -> Any:
        """Begin `copy`, after all copies begun before it.

        locations: the KV entries that it reads or writes; the tensor is in use until the copy is
        complete. after_steps: the steps launched so far come first. Returns the event after which
        the copy is complete; None if it is. Raises: RuntimeError if the device fails; no part of
        the copy is under way then.
        """
        copy()
        return None

    def hold_steps(self, done: Any) -> None:
        """Have steps launched from now on wait for `done`."""


class CudaCopyStream(CopyStream):
    """Copies run beside the decoding, in their own order."""

    deferred = True

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self._scheduler = scheduler
        # PyTorch hands streams out again when it has none left, and has a set of its own for each
        # priority: all of SGLang's are of the other one. A stream that another's work shares would
        # wait for it, or keep it waiting.
        self._stream = torch.cuda.Stream(priority=-1)

    def run(self, copy: Callable[[], None], locations: torch.Tensor, *, after_steps: bool) -> Any:
        stream = self._stream
        if after_steps:
            stream.wait_stream(self._scheduler.forward_stream)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                copy()
            # Made on another stream: its memory must not be given to others before.
            locations.record_stream(stream)
            done = torch.cuda.Event()
            done.record(stream)
        except Exception:
            with suppress(RuntimeError):
                stream.synchronize()
            raise
        return done

    def hold_steps(self, done: Any) -> None:
        # Not the scheduler's own stream under overlap, or the scheduler would wait for the copy as
        # soon as it waits for anything.
        scheduler = self._scheduler
        overlap = scheduler.enable_overlap
        reader = scheduler.forward_stream if overlap else torch.cuda.current_stream()
        reader.wait_event(done)


def copy_stream_of(scheduler: SchedulerProtocol) -> CopyStream:
    """The stream for a scheduler's device."""
    on_cuda = str(scheduler.device).startswith("cuda")
    return CudaCopyStream(scheduler) if on_cuda else CopyStream()
