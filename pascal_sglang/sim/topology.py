"""Hosts and racks, and what moves of KV between them take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pascal_sglang.policy.site import FAR, SAME_HOST, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """So many instances share a host, and so many hosts a rack.

    host_token_s, rack_token_s, far_token_s: seconds that a token of KV takes between two instances
    of a host, over the link that a host has into its rack, and over the link that a rack has to the
    others. A transfer takes all links on its way, for the time of the slowest.
    """

    per_host: int
    per_rack: int
    host_token_s: float
    rack_token_s: float
    far_token_s: float

    def __post_init__(self) -> None:
        if min(self.per_host, self.per_rack) < 1:
            raise ValueError("a host has an instance, and a rack a host")
        for seconds in (self.host_token_s, self.rack_token_s, self.far_token_s):
            if not math.isfinite(seconds) or seconds < 0:
                raise ValueError(f"a token takes a time of at least 0, not {seconds}")

    def site(self, index: int) -> Site:
        """Where an instance is."""
        host = index // self.per_host
        return Site(f"host{host}", f"rack{host // self.per_rack}")

    @property
    def slowest_token_s(self) -> float:
        """Between the two instances that are farthest apart."""
        return max(self.host_token_s, self.rack_token_s, self.far_token_s)

    def token_s(self, source: int, target: int) -> float:
        """Seconds that a token of KV takes from one instance to another."""
        distance = self.site(source).distance(self.site(target))
        return max((self.host_token_s, self.rack_token_s, self.far_token_s)[: distance + 1])

    def links(self, source: int, target: int) -> tuple[list[str], list[str], int]:
        """The names of the links that a transfer leaves through, of those that it comes in through,
        and the distance."""
        here, there = self.site(source), self.site(target)
        distance = here.distance(there)
        leave, come = [f"{source}"], [f"{target}"]
        if distance > SAME_HOST:
            leave, come = [*leave, here.host], [*come, there.host]
        if distance == FAR:
            leave, come = [*leave, here.rack], [*come, there.rack]
        return leave, come, distance
