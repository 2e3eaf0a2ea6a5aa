"""Where an instance is, and how far that is from another one."""

from __future__ import annotations

from dataclasses import dataclass

# Distances.
SAME_HOST, SAME_RACK, FAR = range(3)


@dataclass(frozen=True, slots=True)
class Site:
    """The names of a host and of its rack; empty where they are not known, and then all are one."""

    host: str = ""
    rack: str = ""

    def distance(self, other: Site) -> int:
        """`SAME_HOST`, `SAME_RACK` or `FAR`."""
        if self == other:
            return SAME_HOST
        return SAME_RACK if self.rack == other.rack else FAR


# All are there.
UNKNOWN = Site()
