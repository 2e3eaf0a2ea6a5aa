"""A request's phases and the times its user feels in the paper's terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Phase(Enum):
    """Where a request is: still thinking (prefill included), answering, or over."""

    REASONING = "reasoning"
    ANSWERING = "answering"
    FINISHED = "finished"


class Progress(NamedTuple):
    """Tokens of one request as the engine counts them.

    output_tokens: tokens generated so far, thinking and answer.
    reasoning_tokens: thinking tokens among them, up to and including the end-of-thinking token.
    thinking: the engine still waits for the end of thinking.
    """

    output_tokens: int
    reasoning_tokens: int
    thinking: bool

    @property
    def answer_tokens(self) -> int:
        return 0 if self.thinking else max(0, self.output_tokens - self.reasoning_tokens)


@dataclass(slots=True)
class Break:
    """A time without a step in the middle of a request. kind: `paused`, or `moved` between two
    instances. end: None while it lasts."""

    kind: str
    start: float
    end: float | None = None


# Of a `PhaseTimeline`, beside its breaks.
TIMES = ("arrival", "first_token", "reasoning_end", "first_answer", "last_answer", "finished")


@dataclass(slots=True)
class PhaseTimeline:
    """Timestamps of one request, in seconds of one monotonic clock; None until it happened.

    A request that does not think counts as reasoning until its first token (it has to be waited
    for just the same), and its TTFO is its TTFT.
    """

    arrival: float
    first_token: float | None = None
    reasoning_end: float | None = None
    first_answer: float | None = None
    last_answer: float | None = None
    finished: float | None = None
    reasoning_tokens: int = 0
    answer_tokens: int = 0
    breaks: list[Break] = field(default_factory=list)

    def observe(self, now: float, progress: Progress) -> None:
        """Take in the state after a pass. Counts never go back, so a repeated pass is harmless."""
        if progress.output_tokens <= 0 or self.finished is not None:
            return
        if self.first_token is None:
            self.first_token = now
        if progress.reasoning_tokens > self.reasoning_tokens:
            self.reasoning_tokens = progress.reasoning_tokens
        if progress.thinking:
            return
        if self.reasoning_end is None:
            self.reasoning_end = now
        if progress.answer_tokens > self.answer_tokens:
            if self.first_answer is None:
                self.first_answer = now
            self.last_answer = now
            self.answer_tokens = progress.answer_tokens

    def finish(self, now: float) -> None:
        if self.finished is None:
            self.finished = now
            self.went_on(now)

    def stopped(self, kind: str, now: float) -> None:
        """A break begins, and ends the one before it."""
        self.went_on(now)
        self.breaks.append(Break(kind, now))

    def went_on(self, now: float) -> None:
        """The request gets steps again; nothing happens to one that has no break."""
        if self.breaks and self.breaks[-1].end is None:
            self.breaks[-1].end = now

    def shift(self, seconds: float) -> None:
        """The clock of its times is set forward by so much."""
        for name in TIMES:
            if (at := getattr(self, name)) is not None:
                setattr(self, name, at + seconds)
        for each in self.breaks:
            each.start += seconds
            if each.end is not None:
                each.end += seconds

    @property
    def phase(self) -> Phase:
        if self.finished is not None:
            return Phase.FINISHED
        return Phase.REASONING if self.reasoning_end is None else Phase.ANSWERING

    @property
    def took(self) -> float | None:
        """Arrival to the end of the request, in seconds."""
        return None if self.finished is None else self.finished - self.arrival

    @property
    def ttft(self) -> float | None:
        """Arrival to the first token of any kind, in seconds."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def reasoning_time(self) -> float | None:
        """First token to the end-of-thinking token, in seconds; None for a request that did not
        think or whose thinking never ended."""
        if self.first_token is None or self.reasoning_end is None or self.reasoning_tokens == 0:
            return None
        return self.reasoning_end - self.first_token

    @property
    def ttfo(self) -> float | None:
        """Arrival to the first answering token, in seconds (the paper's TTFT)."""
        return None if self.first_answer is None else self.first_answer - self.arrival

    @property
    def answer_tpot(self) -> float | None:
        """Mean seconds per answering token after the first; None below two answering tokens."""
        if self.first_answer is None or self.last_answer is None or self.answer_tokens < 2:
            return None
        return (self.last_answer - self.first_answer) / (self.answer_tokens - 1)
