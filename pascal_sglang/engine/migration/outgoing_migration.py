"""A request on its way out: reads its KV wherever the ladder has it, and lets go of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.cluster.messages import Chunk, Granted
from pascal_sglang.cluster.migration_source import Source
from pascal_sglang.cluster.transport import Transport, TransportError
from pascal_sglang.engine.kv.host_copies import HostKV
from pascal_sglang.engine.kv.paused import Ladder
from pascal_sglang.engine.kv.serializer import KvBytes
from pascal_sglang.engine.observability.phases import timeline_of
from pascal_sglang.policy.kv_tier import Rung
from pascal_sglang.policy.request import Place


@dataclass(slots=True, eq=False)
class Outgoing:
    """One move from here. target: the instance it goes to. aborted: its client gave it up after the
    Handover. stopped_at: when it was told to leave the batch, in seconds; 0 while it runs. unsaid:
    what is said once the copy begun in the last pass is complete."""

    req: Req
    target: int
    ladder: Ladder
    began: float
    source: Source | None = None
    granted: Granted | None = None
    aborted: bool = False
    stopped_at: float = 0.0
    bytes_sent: int = 0
    unsaid: Chunk | None = None
    _copy: HostKV | None = None
    _written: tuple[str, int, int] | None = None
    _problem: str | None = None

    @property
    def blocked_since(self) -> float:
        """When its last token left; for one that was paused, when the move began to hold it."""
        timeline = timeline_of(self.req)
        return max(self.stopped_at, timeline.last_answer or timeline.reasoning_end or 0.0)

    def place(self, running: set[Req]) -> Place | None:
        """Where the request is; None while its KV cannot be read (it leaves or joins the batch)."""
        if self.req in self.ladder.resident:
            return Place.RESIDENT
        if self.req in self.ladder.host:
            return Place.HOST
        if self.req in running:
            return Place.RUNNING
        between = self.req in self.ladder.leaving or self.req in self.ladder.arriving
        return None if between else Place.WAITING

    def kv_tokens(self, place: Place, in_flight: bool) -> int:
        """KV entries that are written for good."""
        if place is Place.HOST:
            return self.ladder.host[self.req].tokens
        # A step under way still writes the last one.
        return int(self.req.kv.kv_committed_len) - in_flight

    def write(
        self, begin: int, end: int, place: Place, transport: Transport, kv: KvBytes, rank: int
    ) -> None:
        """Begin to put KV of the tokens `begin`..`end` into the target's window; `written` says
        what came of it."""
        assert self.granted is not None
        self._problem = self._written = self._copy = None
        if begin == end:
            return
        size = (end - begin) * kv.per_token
        try:
            if rank >= len(self.granted.landings):
                raise TransportError("the target has fewer TP ranks")
            there = (self.granted.landings[rank], self.granted.offset, size)
            memory = transport.room(*there)
            if place is Place.HOST:
                kv.copy_host(self.ladder.host[self.req].halves(), begin, end, memory)
            else:
                self._copy = kv.copy_out(self._locations(place)[begin:end], memory)
            self._written = there
        except TransportError as error:
            self._problem = str(error)
        except Exception as error:  # Whatever it is: the other ranks wait to be told so.
            self._problem = f"reading KV failed: {error}"

    def written(self, transport: Transport, kv: KvBytes) -> str | None:
        """Wait for what `write` began; None if it is in the window, else why it is not."""
        if self._copy is not None and not kv.copies.wait(self._copy):
            self._problem = "reading KV failed"
        if self._problem is None and self._written is not None:
            try:
                transport.put(*self._written)
                self.bytes_sent += self._written[2]
            except Exception as error:  # As above.
                self._problem = str(error)
        self._copy = self._written = None
        return self._problem

    def _locations(self, place: Place) -> torch.Tensor:
        if place is Place.RESIDENT:
            return self.ladder.resident[self.req]
        return self.ladder.pool.locations(self.req)

    def take_out(self, running: ScheduleBatch, unline: Callable[[Req], None]) -> None:
        """Out of the batch, or out of the line of those who come back into it."""
        self.ladder.moving.add(self.req)
        if self.req in self.ladder.leaving:
            return
        if self.req in self.ladder.resident or self.req in self.ladder.host:
            unline(self.req)
        else:
            self.ladder.leave([self.req], running, lambda _: Rung.RESIDENT)

    def put_back(self) -> Place | None:
        """It stays. Returns where it waits to be brought back; None if it is still leaving the
        batch, waits to be prefilled already, or has ended."""
        held = self.req in self.ladder.moving
        self.ladder.moving.discard(self.req)
        if self.req in self.ladder.resident:
            return Place.RESIDENT
        if self.req in self.ladder.host:
            return Place.HOST
        # Its KV was dropped after the Handover.
        dropped = held and self.req not in self.ladder.leaving and not self.req.finished()
        return Place.WAITING if dropped else None

    def let_go(self) -> None:
        """Give back everything it holds here."""
        self.ladder.moving.discard(self.req)
        self.ladder.let_go(self.req)


def find(rid: str, scheduler: Any, ladder: Ladder) -> Req | None:
    """The live request of that name that runs or is paused."""
    paused = (ladder.leaving, ladder.resident, ladder.host, ladder.arriving)
    places = (scheduler.running_batch.reqs, *paused)
    return next((r for place in places for r in place if r.rid == rid and not r.finished()), None)
