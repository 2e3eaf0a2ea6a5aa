"""Whether a request's LoRA adapter fits beside those of the batch.

A step loads every adapter of its batch, `None` for requests without one among them, into
`--max-loras-per-batch` places; SGLang raises where they do not suffice. A paused request holds no
place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


@dataclass(kw_only=True, slots=True, eq=False)
class LoraSlots:
    """Reads the adapters in use off a live scheduler."""

    scheduler: SchedulerProtocol
    paused_requests: PausedRequests
    # Those of the requests that run, come out of a prefill or arrive, as last read.
    in_use: set[str | None] = field(default_factory=set)

    def read(self, running: ScheduleBatch, last: ScheduleBatch | None) -> None:
        """Take note of the adapters in use; nothing where the server has none."""
        if not self.scheduler.enable_lora:
            return
        self.in_use = self.arriving() | {req.lora_id for req in running.reqs}
        if last is not None and last.forward_mode.is_extend():
            self.in_use |= {req.lora_id for req in last.reqs if not req.finished()}
        if self.scheduler.chunked_req is not None:
            self.in_use.add(self.scheduler.chunked_req.lora_id)
        if self.scheduler.lora_drainer:
            # SGLang tells it of the requests that its prefill step sees: those of the plan.
            waiting = [*self.scheduler.waiting_queue, *self.paused_requests.paused()]
            self.scheduler.lora_drainer.update_draining_state(waiting, running.reqs)

    def arriving(self) -> set[str | None]:
        """Adapters of requests that join the batch after the prefill of this pass."""
        return {req.lora_id for req in self.paused_requests.in_status(PauseStatus.ARRIVING)}

    def fits(self, req: Req) -> bool:
        """Whether the request may start, as far as adapters go."""
        scheduler = self.scheduler
        if not scheduler.enable_lora:
            return True
        if scheduler.lora_drainer and not scheduler.lora_drainer.can_schedule(req):
            return False
        manager = scheduler.tp_worker.model_runner.lora_manager
        wanted = self.in_use | {req.lora_id}
        return req.lora_id in self.in_use or bool(manager.validate_lora_batch(wanted))

    def take(self, req: Req) -> bool:
        """The same for a paused request that joins the batch now; its adapter is in use then. One
        that is being loaded (`--enable-lora-overlap-loading`) is not there yet."""
        scheduler = self.scheduler
        if not scheduler.enable_lora:
            return True
        if not scheduler.can_schedule_lora_req(req, set(self.in_use)):
            return False
        self.in_use.add(req.lora_id)
        return True
