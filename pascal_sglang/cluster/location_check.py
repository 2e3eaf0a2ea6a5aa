"""Finds requests that have ended without the controller hearing of it.

An instance reports each end once, and a message can be lost: a full queue drops it. So the
controller asks every instance now and then which of a few requests, those it has not asked about
for the longest time, still live there. One that lives nowhere is forgotten, once all have said so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

from pascal_sglang.cluster.messages import LocationQuery, LocationReply
from pascal_sglang.cluster.request_locations import RequestLocations

# Seconds between two questions, and how long answers are waited for.
EVERY_S = 5.0
# Of one question: requests, and characters of their ids.
MAX_ASKED = 64
MAX_CHARACTERS = 8192


class LocationCheck:
    """One question at a time. ask: sends it to an instance. migrating: ids of requests that change
    instance at this moment, about which no instance can tell. forgotten: requests that lived
    nowhere."""

    def __init__(
        self,
        request_locations: RequestLocations,
        ask: Callable[[int, LocationQuery], bool],
        migrating: Callable[[], set[str]],
    ) -> None:
        self.request_locations, self._ask, self._migrating = request_locations, ask, migrating
        self.forgotten = 0
        self._number = 0
        self._asked_at = float("-inf")
        # Request -> its instance when the question was asked.
        self._asked: dict[str, int] = {}
        # Instance -> requests that were sent to it before the question.
        self._sent: dict[int, int] = {}
        self._replies: dict[int, LocationReply] = {}

    def tick(self, now: float, sent: Mapping[int, int]) -> None:
        """Once in a while. sent: the live instances, and how many requests went to each so far."""
        if now - self._asked_at < EVERY_S:
            return
        self._conclude()
        self._asked_at = now
        migrating, characters, seen = self._migrating(), 0, []
        for rid in islice(self.request_locations, MAX_ASKED):
            characters += len(rid)
            if characters > MAX_CHARACTERS and self._asked:
                break
            seen.append(rid)
            lives_on = self.request_locations.instance_of(rid)
            if rid not in migrating and lives_on is not None:
                self._asked[rid] = lives_on
        for rid in seen:
            self.request_locations.asked_about(rid)
        if self._asked:
            self._number += 1
            self._sent = dict(sent)
            for instance in sent:
                self._ask(instance, LocationQuery(self._number, list(self._asked)))

    def hear(self, reply: LocationReply) -> None:
        """Take in an instance's answer; one to an earlier question is ignored."""
        if reply.number == self._number and reply.dp_rank in self._sent:
            self._replies[reply.dp_rank] = reply
            if self._replies.keys() == self._sent.keys():
                self._conclude()

    def _conclude(self) -> None:
        """Correct what is known by the answers that have come."""
        alive = {rid: reply.dp_rank for reply in self._replies.values() for rid in reply.rids}
        migrating = self._migrating()
        # A request may live on an instance that has not answered: its move may not have been heard
        # of either.
        complete = self._replies.keys() == self._sent.keys()
        for rid, instance in self._asked.items():
            if rid in migrating or self.request_locations.instance_of(rid) != instance:
                continue
            reply = self._replies.get(instance)
            if rid in alive:
                self.request_locations.lives(rid, alive[rid])
            elif complete and reply is not None and reply.received >= self._sent[instance]:
                # The instance has taken in all that was sent to it before, this one included.
                self.request_locations.gone(rid)
                self.forgotten += 1
        self._asked, self._sent, self._replies = {}, {}, {}
