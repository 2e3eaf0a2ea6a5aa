"""What came back of one request, and whether it was in order.

The three routes are read into one form, so that a streamed reply and a whole one compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from evals.soak.bodies import GENERATE, Body

# Log probabilities depend on how many requests share a pass, in their last digits.
LOGPROB_TOLERANCE = 1e-3


@dataclass(slots=True)
class Part:
    """One reply of a request: of a batch or of parallel samples there are several.

    ids: `/generate` alone tells them. finish, matched: how SGLang says that it ended; message: of
    an abort, where it says why. ends: how often. logprobs: (log probability, token id) of every
    output token; prompt_logprobs: of every prompt token.
    """

    ids: list[int] | None = None
    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    matched: Any = None
    message: str = ""
    ends: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprobs: list[tuple[float, int]] | None = None
    prompt_logprobs: list[tuple[float | None, int]] | None = None

    def differs(self, other: Part) -> str | None:
        """What of two replies to the same body is not the same; None if all is."""
        for name in ("ids", "text", "reasoning", "finish", "matched"):
            if getattr(self, name) != getattr(other, name):
                return name
        for name in ("prompt_tokens", "completion_tokens"):
            mine, its = getattr(self, name), getattr(other, name)
            if None not in (mine, its) and mine != its:
                return name
        for name in ("logprobs", "prompt_logprobs"):
            if not _close(getattr(self, name), getattr(other, name)):
                return name
        return None

    def is_begun_of(self, whole: Part) -> bool:
        """Whether this is how the whole reply begins."""
        if self.ids is not None and whole.ids is not None:
            return whole.ids[: len(self.ids)] == self.ids
        told, its = self.reasoning + self.text, whole.reasoning + whole.text
        return its.startswith(told) or its.startswith(told.rstrip("\ufffd"))


def _close(mine: Any, its: Any) -> bool:
    if mine is None or its is None:
        return mine is its
    return len(mine) == len(its) and all(
        a[1] == b[1] and (a[0] is b[0] or abs(a[0] - b[0]) <= LOGPROB_TOLERANCE)
        for a, b in zip(mine, its, strict=True)
    )


@dataclass(slots=True)
class Reply:
    """A request that was sent. Times are `time.perf_counter()`.

    status: of HTTP, or of an error event; 0 where the connection ended. error: the message of an
    error. faults: what was not in order with the reply itself.
    """

    body: Body
    rid: str
    streamed: bool
    sent: float
    ended: float = 0.0
    status: int = 0
    error: str | None = None
    parts: dict[int, Part] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def part(self, index: int) -> Part:
        return self.parts.setdefault(index, Part())

    def fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)

    def whole(self, payload: bytes) -> None:
        """A reply in one piece."""
        told = orjson.loads(payload)
        if self.body.path == GENERATE:
            for index, each in enumerate(told if isinstance(told, list) else [told]):
                self._generated(index, each)
            return
        for choice in told["choices"]:
            part = self.part(choice["index"])
            message = choice.get("message", {})
            part.text = message.get("content") or choice.get("text") or ""
            part.reasoning = message.get("reasoning_content") or ""
            self._choice_ended(part, choice)
        self._usage(told)

    def event(self, payload: bytes) -> None:
        """An event of a stream."""
        told = orjson.loads(payload)
        if "error" in told:
            error = told["error"]
            code = error.get("code") if isinstance(error, Mapping) else None
            self.status, self.error = int(code or 500), str(error)
        elif self.body.path == GENERATE:
            self._generated(told.get("index", 0), told)
        else:
            for choice in told["choices"]:
                part = self.part(choice["index"])
                if part.ends:
                    self.fault("an event after the end")
                delta = choice.get("delta", {})
                part.text += delta.get("content") or choice.get("text") or ""
                part.reasoning += delta.get("reasoning_content") or ""
                if choice.get("finish_reason"):
                    self._choice_ended(part, choice)
            self._usage(told)

    def _generated(self, index: int, told: Mapping[str, Any]) -> None:
        part, meta, ids = self.part(index), told["meta_info"], told["output_ids"]
        if part.ends:
            self.fault("an event after the end")
        if part.ids is not None and ids[: len(part.ids)] != part.ids:
            self.fault("a stream took back a token")
        part.ids, part.text = list(ids), told["text"]
        part.prompt_tokens = meta.get("prompt_tokens")
        part.completion_tokens = meta.get("completion_tokens")
        if meta["id"] != self.rid and len(self.body.limits) == 1:
            self.fault("the reply of another request")
        if "output_token_logprobs" in meta:
            part.logprobs = [(p, i) for p, i, *_ in meta["output_token_logprobs"]]
        if "input_token_logprobs" in meta:
            part.prompt_logprobs = [(p, i) for p, i, *_ in meta["input_token_logprobs"]]
        reason = meta["finish_reason"]
        if reason is not None:
            part.ends += 1
            part.finish, part.matched = reason["type"], reason.get("matched")
            part.message = reason.get("message") or ""
            if part.finish == "abort" and reason.get("status_code"):
                # What a whole reply says by its status.
                self.status, self.error = int(reason["status_code"]), reason.get("message")

    def _choice_ended(self, part: Part, choice: Mapping[str, Any]) -> None:
        part.ends += choice["finish_reason"] is not None
        part.finish, part.matched = choice["finish_reason"], choice.get("matched_stop")

    def _usage(self, told: Mapping[str, Any]) -> None:
        """Of a single reply only: SGLang adds those of several up."""
        usage = told.get("usage")
        if usage and len(self.body.limits) == 1:
            part = self.part(0)
            part.prompt_tokens = usage["prompt_tokens"]
            part.completion_tokens = usage["completion_tokens"]


def check(reply: Reply, *, aborted: bool) -> None:
    """Note what is wrong with a reply of status 200 that ended. aborted: whether it may have been
    ended early."""
    limits = reply.body.limits
    if len(reply.parts) != len(limits) and not aborted:
        reply.fault(f"{len(reply.parts)} replies instead of {len(limits)}")
    for index, part in reply.parts.items():
        if part.ends != 1:
            reply.fault(f"ended {part.ends} times")
            continue
        if part.ids is not None and part.completion_tokens != len(part.ids):
            reply.fault(f"{len(part.ids)} tokens, usage says {part.completion_tokens}")
        if part.finish == "abort":
            if not aborted:
                reply.fault(f"aborted by nobody: {part.message}".rstrip(": "))
            elif part.ids and not part.prompt_tokens:
                reply.fault("aborted, and no prompt tokens in its usage")
        elif part.finish == "length":
            made, limit = part.completion_tokens, limits[index] if index < len(limits) else None
            if made is not None and made != limit:
                reply.fault(f"ended by length at {made} of {limit} tokens")
        elif part.finish == "stop":
            _check_stop(reply, part)
        else:
            reply.fault(f"ended by {part.finish!r}")
        told = part.logprobs
        if told is not None and part.ids is not None and [i for _, i in told] != part.ids:
            reply.fault("log probabilities of other tokens than were returned")


def _check_stop(reply: Reply, part: Part) -> None:
    sampling, matched = reply.body.sampling, part.matched
    if isinstance(matched, int):
        known = sampling.get("stop_token_ids") or ()
        if matched not in known and sampling.get("ignore_eos"):
            reply.fault(f"stopped by token {matched}, which was not asked for")
        if part.ids and part.ids[-1] != matched:
            reply.fault("stopped by a token that is not its last")
    elif isinstance(matched, str) and matched not in (sampling.get("stop") or ()):
        reply.fault(f"stopped by {matched!r}, which was not asked for")
