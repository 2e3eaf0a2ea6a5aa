"""The forecast towards clients: a header, comments in streams, 503 where it takes too long, and
thinking budgets under backlog.

A request is decided on once, when it has been parsed and before SGLang takes it. What was decided
reaches its response through a context variable: between the two lie all of SGLang's formats.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pascal_sglang import clock
from pascal_sglang.cluster.forecast_files import FOLDER_ENV, ForecastFiles, Shown
from pascal_sglang.cluster.metrics import FrontendMetrics
from pascal_sglang.config import PascalConfig
from pascal_sglang.policy.forecast import Estimate
from pascal_sglang.request_checks import asked, is_number, thinking_budget_of

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

ETA_HEADER, BUDGET_HEADER = b"x-pascal-answer-eta", b"x-pascal-thinking-budget"
# Seconds between two comments in a stream.
COMMENT_S = 1.0
# Thinking tokens that brownout leaves in any case.
LEAST_BUDGET = 128
# The shortest and the longest `Retry-After`, in seconds.
RETRY_S = (1, 300)
# Set on SGLang's object of a request whose `reasoning_effort` gave it a budget.
EFFORT = "pascal_effort_budget"
# Characters of a prompt that is not tokenized yet, per token.
TOKEN_CHARACTERS = 4
ABOUT_BODIES = (b"content-type", b"content-length", b"content-encoding")


class Overloaded(ValueError):
    """The request is not taken: its answer would begin too late."""


@dataclass(slots=True, eq=False)
class Exchange:
    """One HTTP request and its response."""

    began: float = field(default_factory=clock.now)
    decided: bool = False
    # When the answer is expected, as of the arrival.
    estimate: Estimate | None = None
    # Why the request is not taken, and when to try again, in seconds.
    refusal: str | None = None
    retry_s: int = 0
    # SGLang's object of the request, once it asked for comments.
    followed: Any = None
    answers: bool = False
    # The thinking budget that the request got here, and why: `brownout` or `effort`.
    budget: tuple[int, str] | None = None


_exchange: ContextVar[Exchange | None] = ContextVar("pascal_exchange", default=None)


class AnswerEta:
    """Decides on requests, and keeps count. metrics: None without `--enable-metrics`."""

    def __init__(
        self, config: PascalConfig, files: ForecastFiles, metrics: FrontendMetrics | None
    ) -> None:
        self.config = config
        self.files = files
        self.metrics = metrics
        self.counts: dict[str, Counter[str]] = {"refused": Counter(), "capped": Counter()}

    def decide(self, obj: Any) -> None:
        """Forecast a request before it is taken; cap its thinking under backlog.

        Raises: Overloaded, where its answer would begin later than it or the operator allows.
        """
        exchange = _exchange.get()
        generates = hasattr(obj, "require_reasoning")
        if exchange is None or exchange.decided or not generates:
            return
        exchange.decided = True
        if (effort := getattr(obj, EFFORT, None)) is not None:
            exchange.budget = (effort, "effort")
            self._count("capped", "effort")
        shown = {i: each for i, each in self.files.shown().items() if each.takes_requests}
        if (pinned := getattr(obj, "routed_dp_rank", None)) is not None:
            shown = {i: each for i, each in shown.items() if i == pinned}
        customs = [params.get("custom_params") for params in _sampling_params(obj)]
        if any(asked(custom, "eta_comments") is True for custom in customs):
            exchange.followed = obj
        if not shown:
            return
        self._cap(obj, exchange, list(shown.values()))
        exchange.estimate = self._estimate(obj, list(shown.values()))
        idle = any(each.idle for each in shown.values())
        self._refuse_if_late(exchange, customs, idle=idle)

    def _estimate(self, obj: Any, shown: list[Shown]) -> Estimate:
        """Where placement goes by the forecast, of the best instance; else of the worst."""
        thinks = bool(getattr(obj, "require_reasoning", False))
        budgets = [budget_of(obj, params) for params in _sampling_params(obj)]
        known = [budget for budget in budgets if budget is not None]
        limit = max(known) + 1 if len(known) == len(budgets) and known else math.inf
        prompt = _prompt_tokens(obj)
        found = [
            each.arrival.estimate(
                each.arrival.prompt if prompt is None else prompt, thinks=thinks, limit=limit
            )
            for each in shown
        ]
        choose = min if self.config.places else max
        return choose(found, key=lambda estimate: estimate.p50)

    def _refuse_if_late(self, exchange: Exchange, customs: list[Any], *, idle: bool) -> None:
        """idle: an instance has no request. The operator's limit is for overload: there it would
        refuse everybody for ever, because nothing would be learnt that changes the forecast."""
        assert exchange.estimate is not None
        deadlines = [asked(custom, "ttfo_deadline_s") for custom in customs]
        own = min((float(d) for d in deadlines if is_number(d)), default=math.inf)
        operators = math.inf if idle else self.config.max_ttfo or math.inf
        most_s = min(own, operators)
        expected_s = exchange.estimate.p50
        if expected_s <= most_s:
            return
        name = "deadline" if own < operators else "max_ttfo"
        whose = "the request's ttfo_deadline_s" if own < operators else "this server's limit"
        self._count("refused", name)
        exchange.budget = None
        exchange.retry_s = min(max(math.ceil(expected_s - most_s), RETRY_S[0]), RETRY_S[1])
        exchange.refusal = (
            f"An answer would begin in about {expected_s:.1f} s, later than {whose} of "
            f"{most_s:g} s. Try again in {exchange.retry_s} s."
        )
        raise Overloaded(exchange.refusal)

    def _cap(self, obj: Any, exchange: Exchange, shown: list[Shown]) -> None:
        """Brownout: give thinking a budget where it has none and there is a backlog."""
        level = self.config.brownout
        if level == "off" or not getattr(obj, "require_reasoning", False):
            return
        if not all(each.has_backlog for each in shown):
            return
        budget = max(LEAST_BUDGET, int(max(each.thinking[level] for each in shown)))
        for params in _sampling_params(obj):
            if asked(params.get("custom_params"), "brownout") is False:
                continue
            if give_budget(obj, params, budget):
                exchange.budget = (budget, "brownout")
                self._count("capped", "brownout")

    def _count(self, name: str, why: str) -> None:
        self.counts[name][why] += 1
        if self.metrics is not None:
            self.metrics.count(name, why)

    def seconds_left(self, exchange: Exchange) -> tuple[float, float] | None:
        """The median and the P90 of a request that thinks, from now on."""
        rids = getattr(exchange.followed, "rid", None)
        for each in self.files.shown().values():
            for rid in rids if isinstance(rids, list) else [rids]:
                if rid in each.requests:
                    half, most = each.requests[rid]
                    return max(0.0, half - each.age_s), max(0.0, most - each.age_s)
        if exchange.estimate is None:
            return None
        passed = clock.now() - exchange.began
        return max(0.0, exchange.estimate.p50 - passed), max(0.0, exchange.estimate.p90 - passed)

    def describe(self) -> dict[str, Any]:
        """For `GET /pascal/status`: requests refused and capped, by reason."""
        return {name: dict(counts) for name, counts in self.counts.items()}


_active: AnswerEta | None = None


def activate(
    config: PascalConfig, states: Callable[[], list[str]], metrics: FrontendMetrics | None
) -> None:
    """Forecast for clients of this process from now on, if instances do."""
    global _active
    folder = os.environ.get(FOLDER_ENV)
    files = None if folder is None else ForecastFiles(Path(folder), states)
    _active = None if files is None else AnswerEta(config, files, metrics)


def describe() -> dict[str, Any] | None:
    return None if _active is None else _active.describe()


def decide(obj: Any) -> None:
    """Decide on a request that has been parsed; see `AnswerEta.decide`."""
    if _active is not None:
        _active.decide(obj)


def exchange() -> Exchange | None:
    """The HTTP request of this context."""
    return _exchange.get()


def apply_effort(original: Callable[..., Any], serving: Any, request: Any, *args: Any) -> Any:
    """Around `OpenAIServingChat._convert_to_internal_request`: `reasoning_effort` becomes the
    thinking budget that the operator gave it, unless the request brings one."""
    adapted, processed = original(serving, request, *args)
    config = PascalConfig.from_env()
    effort = getattr(request, "reasoning_effort", None)
    if config is None or not isinstance(effort, str):
        return adapted, processed
    budget = config.budget_of_effort(effort)
    if budget is None or not getattr(adapted, "require_reasoning", False):
        return adapted, processed
    for params in _sampling_params(adapted):
        if give_budget(adapted, params, budget):
            setattr(adapted, EFFORT, budget)
    return adapted, processed


def budget_of(obj: Any, params: dict[str, Any]) -> int | None:
    """The thinking budget that a request brings."""
    own = getattr(obj, "max_thinking_tokens", None)
    if own is None:
        own = thinking_budget_of(params.get("custom_params"))
    return own if isinstance(own, int) and not isinstance(own, bool) and own >= 0 else None


def give_budget(obj: Any, params: dict[str, Any], budget: int) -> bool:
    """Give a request that brings no thinking budget this one; whether it got it."""
    custom = params.get("custom_params")
    custom = {} if custom is None else custom
    # What is no object is SGLang's to refuse.
    if budget_of(obj, params) is not None or not isinstance(custom, dict):
        return False
    params["custom_params"] = {**custom, "thinking_budget": budget}
    return True


def _sampling_params(obj: Any) -> list[dict[str, Any]]:
    """The sampling parameters of a request, or of all requests of a batch; those that are not there
    are made."""
    params = getattr(obj, "sampling_params", None)
    if params is None and hasattr(obj, "sampling_params"):
        params = obj.sampling_params = {}
    each = params if isinstance(params, list) else [params]
    return [one for one in each if isinstance(one, dict)]


def _prompt_tokens(obj: Any) -> int | None:
    """Of the longest prompt, about; None where nothing says it."""
    ids = getattr(obj, "input_ids", None)
    if isinstance(ids, list) and ids:
        return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
    text = getattr(obj, "text", None)
    texts = text if isinstance(text, list) else [text]
    known = [len(each) for each in texts if isinstance(each, str)]
    return max(known) // TOKEN_CHARACTERS if known else None


def headers_of(exchange: Exchange) -> Iterator[tuple[bytes, bytes]]:
    """What a response says of its request."""
    if (estimate := exchange.estimate) is not None:
        yield ETA_HEADER, f"{estimate.p50:.2f};{estimate.p90:.2f}".encode()
    if exchange.budget is not None:
        tokens, why = exchange.budget
        yield BUDGET_HEADER, f"{tokens};{why}".encode()


class AnswerEtaMiddleware:
    """ASGI: gives every request an `Exchange`, and its response what came of it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        # SGLang takes `PUT /generate` as well.
        takes = scope["type"] == "http" and scope["method"] in ("POST", "PUT")
        if not takes or _active is None:
            await self.app(scope, receive, send)
            return
        exchange = Exchange()
        token = _exchange.set(exchange)
        response = Response(send, exchange, _active)
        try:
            await self.app(scope, receive, response.send)
        except Overloaded:
            # A route that answers no ValueError. Once a reply has begun, it can only break off.
            if not await response.refuse():
                raise
        finally:
            response.end()
            _exchange.reset(token)


class Response:
    """The response to one request, on its way out."""

    def __init__(self, send: Send, exchange: Exchange, eta: AnswerEta) -> None:
        self._send = send
        self._exchange = exchange
        self._eta = eta
        self._lock = asyncio.Lock()
        self._comments: asyncio.Task[None] | None = None
        self._begun = self._replaced = False
        self._over = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._start(message)
            return
        if self._replaced:
            return
        async with self._lock:
            self._over = self._over or not message.get("more_body", False)
            await self._send(message)

    async def refuse(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> bool:
        """Answer 503 where that has been decided and no reply has begun; whether it was."""
        exchange = self._exchange
        if exchange.refusal is None or self._begun:
            return False
        self._begun = self._replaced = True
        await self._refuse(exchange.refusal, exchange.retry_s, headers)
        return True

    async def _start(self, message: Message) -> None:
        exchange = self._exchange
        if await self.refuse(message.get("headers", ())):
            return
        self._begun = True
        headers = [*message.get("headers", ()), *headers_of(exchange)]
        await self._send({**message, "headers": headers})
        kind = dict(headers).get(b"content-type", b"")
        if exchange.followed is not None and kind.startswith(b"text/event-stream"):
            self._comments = asyncio.create_task(self._comment())

    async def _refuse(
        self, why: str, retry_s: int, replaced: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """503 instead of whatever SGLang makes of the error, in its form of one. replaced: headers
        of that, of which those about its body go."""
        status = HTTPStatus.SERVICE_UNAVAILABLE
        error = {
            "object": "error",
            "message": why,
            "type": "ServiceUnavailable",
            "param": None,
            "code": status.value,
        }
        body = json.dumps({**error, "error": error}).encode()
        headers = [
            *(each for each in replaced if each[0].lower() not in ABOUT_BODIES),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(retry_s).encode()),
            *headers_of(self._exchange),
        ]
        start = {"type": "http.response.start", "status": status.value, "headers": headers}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    async def _comment(self) -> None:
        """Say once in a while when the answer is expected, as a comment, which clients skip."""
        while not (self._over or self._exchange.answers):
            left = self._eta.seconds_left(self._exchange)
            if left is not None:
                text = f": pascal-answer-eta {left[0]:.2f};{left[1]:.2f}\n\n"
                async with self._lock:
                    if self._over:
                        return
                    body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
                    with contextlib.suppress(OSError):
                        await self._send(body)
            await asyncio.sleep(COMMENT_S)

    def end(self) -> None:
        if self._comments is not None:
            self._comments.cancel()
