"""What the controller and its instances say to each other about requests.

`rid` is the request's id, `kv_tokens` the KV entries that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Boundary:
    """Instance to controller: the request has just ended its thinking.

    remaining: the most answering tokens that it can still produce. likely: how many it probably
    will. passes: scheduling passes that moving it takes, and so tokens that it answers meanwhile.
    """

    dp_rank: int
    rid: str
    kv_tokens: int
    remaining: int
    likely: int
    passes: int


@dataclass(frozen=True, slots=True)
class Order:
    """Controller to instance: move the request to the instance `target`."""

    move: str
    rid: str
    target: int


@dataclass(frozen=True, slots=True)
class Over:
    """Either instance to controller: a move has ended. `done`: the request is the target's;
    otherwise `why` it stays."""

    dp_rank: int
    move: str
    done: bool
    why: str


@dataclass(frozen=True, slots=True)
class Gone:
    """Instance to controller: the request has ended there. `blocks` name its whole text
    (`cluster.prefixes`), which the instance holds for the next turn."""

    dp_rank: int
    rid: str
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class LocationQuery:
    """Controller to instances: which of these requests live there? `number` names the question."""

    number: int
    rids: list[str]


@dataclass(frozen=True, slots=True)
class LocationReply:
    """Instance to controller: these of the requests asked about live there. received: requests that
    the instance had taken in by then (`Status.received`)."""

    dp_rank: int
    number: int
    received: int
    rids: list[str]


@dataclass(frozen=True, slots=True)
class Died:
    """Controller to instances: the instance is no more."""

    dp_rank: int


@dataclass(frozen=True, slots=True)
class Answered:
    """Instance to controller: it has answered a control request, whose type has that name."""

    dp_rank: int
    request: str
