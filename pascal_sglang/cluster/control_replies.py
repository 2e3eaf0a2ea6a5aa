"""Control requests that every instance answers, and who answers in the place of a dead one.

SGLang's tokenizer manager sends a control request once, and waits without a time-out until as many
replies have come as there were instances at start. A weight update holds its writer lock meanwhile,
which keeps every new request out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers import io_struct as io

from pascal_sglang.handshake import INIT_INFO_KEY

# Requests that wait for replies. Each tokenizer worker sends one of each kind at a time.
MAX_WAITING = 256


def _told(reply: type) -> Callable[[str], Any]:
    """A dead instance holds no weights, no cache and no profile: nothing about it has failed."""
    return lambda text: reply(success=True, message=text)


def _lora(text: str) -> Any:
    return io.LoRAUpdateOutput(success=True)


# For each kind of request that all instances answer, the reply for one that has died.
REPLIES: dict[type, Callable[[str], Any]] = {
    io.FlushCacheReqInput: _told(io.FlushCacheReqOutput),
    io.ProfileReq: _told(io.ProfileReqOutput),
    io.UpdateWeightFromDiskReqInput: _told(io.UpdateWeightFromDiskReqOutput),
    io.UpdateWeightsFromDistributedReqInput: _told(io.UpdateWeightsFromDistributedReqOutput),
    io.UpdateWeightsFromTensorReqInput: _told(io.UpdateWeightsFromTensorReqOutput),
    io.UpdateWeightsFromIPCReqInput: _told(io.UpdateWeightsFromIPCReqOutput),
    io.InitWeightsUpdateGroupReqInput: _told(io.InitWeightsUpdateGroupReqOutput),
    io.DestroyWeightsUpdateGroupReqInput: _told(io.DestroyWeightsUpdateGroupReqOutput),
    io.BeginWeightUpdateReqInput: _told(io.BeginWeightUpdateReqOutput),
    io.EndWeightUpdateReqInput: _told(io.EndWeightUpdateReqOutput),
    io.CheckWeightsReqInput: _told(io.CheckWeightsReqOutput),
    io.UpdateWeightVersionReqInput: lambda _: io.UpdateWeightVersionReqOutput(),
    io.GetWeightsByNameReqInput: lambda _: io.GetWeightsByNameReqOutput(parameter=None),
    io.ReleaseMemoryOccupationReqInput: lambda _: io.ReleaseMemoryOccupationReqOutput(),
    io.ResumeMemoryOccupationReqInput: lambda _: io.ResumeMemoryOccupationReqOutput(),
    io.SlowDownReqInput: lambda _: io.SlowDownReqOutput(),
    io.ExpertDistributionReq: lambda _: io.ExpertDistributionReqOutput(),
    io.SetInternalStateReq: lambda _: io.SetInternalStateReqOutput(updated=False),
    io.GetInternalStateReq: lambda _: io.GetInternalStateReqOutput(internal_state={}),
    io.LoadLoRAAdapterReqInput: _lora,
    io.UnloadLoRAAdapterReqInput: _lora,
    io.LoadLoRAAdapterFromTensorsReqInput: _lora,
    io.DumperControlReqInput: lambda _: io.DumperControlReqOutput(success=True, response=[]),
    io.AddExternalCorpusReqInput: _told(io.AddExternalCorpusReqOutput),
    io.RemoveExternalCorpusReqInput: _told(io.RemoveExternalCorpusReqOutput),
    io.ListExternalCorporaReqInput: _told(io.ListExternalCorporaReqOutput),
    io.AttachHiCacheStorageReqInput: _told(io.AttachHiCacheStorageReqOutput),
    io.DetachHiCacheStorageReqInput: _told(io.DetachHiCacheStorageReqOutput),
    io.ClearHiCacheReqInput: lambda _: io.ClearHiCacheReqOutput(success=True),
}
# Releases before 0.5.23 lack it. `http_server.living_layouts` leaves the empty layout out.
if hasattr(io, "GetHiCacheL3LayoutReq"):
    REPLIES[io.GetHiCacheL3LayoutReq] = lambda _: io.GetHiCacheL3LayoutReqOutput(layout={})


@dataclass(slots=True)
class Waiting:
    """One control request under way; not the request itself, which may carry weights."""

    kind: type
    # The way back where there are several tokenizer workers.
    worker_ipc: str | None
    # Instances that have not answered yet.
    live: set[int]
    # Instances that this controller answers for, and what is the matter with each.
    absent: dict[int, str] = field(default_factory=dict)


class ControlReplies:
    """Knows which instance still owes a reply to which control request.

    A reply for an absent instance leaves after those of all the others: SGLang takes the first one
    for the result of some operations. reply: sends a message to the tokenizer manager.
    """

    def __init__(self, reply: Callable[[Any], None]) -> None:
        self._reply = reply
        self._waiting: deque[Waiting] = deque(maxlen=MAX_WAITING)

    def __len__(self) -> int:
        return len(self._waiting)

    def sent(self, request: Any, live: Iterable[int], absent: dict[int, str]) -> None:
        """The request went to the `live` instances, and not to the `absent` ones."""
        if type(request) in REPLIES:
            ipc = request.http_worker_ipc
            self._waiting.append(Waiting(type(request), ipc, set(live), dict(absent)))
            self._close_complete()

    def answered(self, instance: int, kind: str) -> None:
        """The instance has answered a control request of that kind."""
        for waiting in self._waiting:
            if instance in waiting.live and waiting.kind.__name__ == kind:
                waiting.live.discard(instance)
                break
        self._close_complete()

    def died(self, instance: int) -> None:
        """What the instance still owed, this controller answers."""
        for waiting in self._waiting:
            if instance in waiting.live:
                waiting.live.discard(instance)
                waiting.absent[instance] = "dead"
        self._close_complete()

    def _close_complete(self) -> None:
        for waiting in [w for w in self._waiting if not w.live]:
            self._waiting.remove(waiting)
            for instance, state in waiting.absent.items():
                reply = reply_for(waiting.kind, instance, state)
                reply.http_worker_ipc = waiting.worker_ipc
                self._reply(reply)


def reply_for(kind: type, instance: int, state: str) -> Any:
    """The reply to such a request in the place of an instance that is `dead` or `silent`."""
    reply = REPLIES[kind](f"Instance {instance} is {state}.")
    if isinstance(reply, io.GetInternalStateReqOutput):
        reply.internal_state = {INIT_INFO_KEY: {"dp_rank": instance, state: True}}
    return reply
