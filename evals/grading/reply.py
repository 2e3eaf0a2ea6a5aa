"""What came back for one prompt of a chat: thinking, answer, and their times.

Thinking is what comes as `reasoning_content` (or `reasoning`, as some servers call it), the answer
what comes as `content`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from evals.load.attended import CUT
from evals.load.record import Record


class Piece(NamedTuple):
    """Text that came in one event."""

    at_s: float
    characters: int


@dataclass(slots=True)
class Heard:
    """record: its times; a request is due when it is sent, because the loop is closed.
    prompt_tokens, completion_tokens, reasoning_tokens: the server's counts, where it tells."""

    record: Record = field(default_factory=lambda: Record(arrival_s=0.0))
    thinking: str = ""
    answer: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    _thinking: list[Piece] = field(default_factory=list)
    _answer: list[Piece] = field(default_factory=list)

    @property
    def cut(self) -> bool:
        """Ctrl-C came before its end, or before its beginning."""
        return self.record.sent_s is None or self.record.error == CUT

    def note(self, event: object, now_s: float) -> None:
        """Add one server-sent event. Raises ValueError for what is none."""
        if not isinstance(event, Mapping):
            raise ValueError(f"not an event: {str(event)[:40]!r}")
        if event.get("error"):
            self.record.error = str(event["error"])[:200]
            return
        self._count(event.get("usage") or {})
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            said = delta.get("content") or ""
            self.thinking += thought
            self.answer += said
            self._thinking += [Piece(now_s, len(thought))] if thought else []
            self._answer += [Piece(now_s, len(said))] if said else []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if self.finish_reason == "abort":
            self.record.error = "abort"

    def _count(self, usage: Mapping[str, Any]) -> None:
        details = usage.get("completion_tokens_details") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        self.completion_tokens = usage.get("completion_tokens", self.completion_tokens)
        thought = details.get("reasoning_tokens", usage.get("reasoning_tokens"))
        self.reasoning_tokens = self.reasoning_tokens if thought is None else thought

    def close(self) -> None:
        """Nothing more will come: token times from those of the pieces."""
        total, thought = self.completion_tokens, self.reasoning_tokens
        answered = None if total is None or thought is None else total - thought
        thinking_s = _token_s(self._thinking, thought)
        self.record.token_s = thinking_s + _token_s(self._answer, answered)
        self.record.reasoning_tokens = len(thinking_s)
        self.record.finished = self.finish_reason is not None and self.record.error is None
        if not self.record.finished and self.record.error is None:
            self.record.error = "stream ended early"


def _token_s(pieces: Sequence[Piece], tokens: int | None) -> list[float]:
    """A piece holds one token, and what the server counted beyond that falls to the pieces by their
    length: under load several tokens come as one piece. Without a count, or with one token more
    than pieces (the marker at the end has no text), each is one token."""
    extra = (tokens or 0) - len(pieces)
    extra = extra if extra > 1 else 0
    whole = sum(piece.characters for piece in pieces)
    token_s: list[float] = []
    so_far = given = 0
    for piece in pieces:
        so_far += piece.characters
        due = round(extra * so_far / whole)
        token_s += [piece.at_s] * (1 + due - given)
        given = due
    return token_s
