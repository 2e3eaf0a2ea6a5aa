"""Keeps a chunk of a stream as it is now, cheaply, until it is sent.

SGLang's streams are cumulative unless `--incremental-streaming-output`: every chunk carries the
whole text so far, and lists (`output_ids`, log probabilities) that go on growing after it was made.
So of a held chunk only their lengths are kept: its text is the beginning of a later chunk's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Chunk = dict[str, Any]


@dataclass(slots=True)
class Text:
    """The longest text of a run of chunks each of which begins with the one before."""

    longest: str = ""

    def grows_to(self, text: str) -> bool:
        """Whether `text` belongs to the run; it is then the longest."""
        grows = text.startswith(self.longest)
        if grows:
            self.longest = text
        return grows


@dataclass(frozen=True, slots=True)
class HeldChunk:
    """One chunk without its text, and the lengths of its text and lists when it was made."""

    chunk: Chunk
    text: Text | None
    text_length: int
    lengths: dict[str, int]
    meta_lengths: dict[str, int]

    def as_it_was(self) -> Chunk:
        """The chunk as SGLang made it; the original dictionaries stay untouched."""
        chunk = _cut(self.chunk, self.lengths)
        if self.text is not None:
            chunk["text"] = self.text.longest[: self.text_length]
        if self.meta_lengths:
            chunk["meta_info"] = _cut(chunk["meta_info"], self.meta_lengths)
        return chunk


class Holder:
    """Holds the chunks of one answer, which share their text."""

    def __init__(self) -> None:
        self._text = Text()

    def hold(self, chunk: Chunk) -> HeldChunk:
        text = chunk.get("text")
        meta = chunk.get("meta_info")
        lengths, meta_lengths = _lengths(chunk), _lengths(meta) if isinstance(meta, dict) else {}
        count = meta.get("completion_tokens") if isinstance(meta, dict) else None
        if isinstance(count, int) and lengths.get("output_ids", 0) > count:
            # A prompt's chunk lies about in SGLang while others of its batch have their turn.
            lengths["output_ids"] = count
        if not isinstance(text, str):
            return HeldChunk(chunk, None, 0, lengths, meta_lengths)
        if not self._text.grows_to(text):
            self._text = Text(text)
        # A copy: SGLang may keep the original for its crash dump.
        return HeldChunk({**chunk, "text": None}, self._text, len(text), lengths, meta_lengths)


def _lengths(holder: dict[str, Any]) -> dict[str, int]:
    return {key: len(value) for key, value in holder.items() if isinstance(value, list)}


def _cut(holder: dict[str, Any], lengths: dict[str, int]) -> dict[str, Any]:
    grown = {
        key: holder[key][:length] for key, length in lengths.items() if len(holder[key]) > length
    }
    return {**holder, **grown}
