"""The forecast towards clients: a header, comments in streams, 503 where it takes too long, and
thinking budgets under backlog.

A request is decided on once, when it has been parsed and before SGLang takes it. What was decided
reaches its response through a context variable: between the two lie all of SGLang's formats.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pascal_sglang import clock
from pascal_sglang.cluster.forecast_files import FOLDER_ENV, ForecastFiles, Shown
from pascal_sglang.cluster.metrics import FrontendMetrics
from pascal_sglang.config import PascalConfig
from pascal_sglang.policy.forecast_errors import Estimate
from pascal_sglang.request_checks import asked, is_number, thinking_budget_of

# A thinking budget that a request got here, in tokens, and why: `brownout` or `effort`.
Budget = tuple[int, str]

# Thinking tokens that brownout leaves in any case.
LEAST_BUDGET = 128
# The shortest and the longest `Retry-After`, in seconds.
RETRY_S = (1, 300)
# Set on SGLang's object of a request whose `reasoning_effort` gave it a budget.
EFFORT = "pascal_effort_budget"
# Characters of a prompt that is not tokenized yet, per token.
TOKEN_CHARACTERS = 4


class Overloaded(ValueError):
    """The request is not taken: its answer would begin too late."""


@dataclass(slots=True, eq=False)
class Exchange:
    """One HTTP request and its response."""

    began: float = field(default_factory=clock.now)
    # Set once it has been decided on.
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    # When the answer is expected, as of the arrival.
    estimate: Estimate | None = None
    # Why the request is not taken, and when to try again, in seconds.
    refusal: str | None = None
    retry_s: int = 0
    # SGLang's object of the request.
    request: Any = None
    # Its stream is to have comments, until it answers.
    comments: bool = False
    answers: bool = False
    # What each request of a batch got here; a single one for requests that share their parameters.
    budgets: Sequence[Budget | None] = ()

    def budget_of(self, index: object) -> Budget | None:
        """What the answer with this index got, of several to a batch; None stands for the only
        one."""
        if len(self.budgets) <= 1 or not isinstance(index, int):
            return self.budgets[0] if self.budgets else None
        number = index // (getattr(self.request, "parallel_sample_num", None) or 1)
        return self.budgets[number] if number < len(self.budgets) else None

    @property
    def budget(self) -> Budget | None:
        """What every request of it got; None where they differ."""
        return self.budgets[0] if len(set(self.budgets)) == 1 else None


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

    def decide(self, obj: Any, tenant: str = "") -> None:
        """Forecast a request before it is taken; cap its thinking under backlog. tenant: its
        digest, where tenants are told apart.

        Raises: Overloaded, where its answer would begin later than it or the operator allows.
        """
        exchange = _exchange.get()
        if exchange is None or exchange.decided.is_set() or not hasattr(obj, "require_reasoning"):
            return
        exchange.request = obj
        try:
            self._decide(obj, exchange, tenant)
        except Overloaded:
            # SGLang's routes end a stream by aborting what was made of its request: nothing yet.
            obj.is_single, obj.rid = False, []
            raise
        finally:
            exchange.decided.set()

    def _decide(self, obj: Any, exchange: Exchange, tenant: str) -> None:
        each = _sampling_params(obj)
        if exchange.comments:
            _ask_for_comments(each)
        customs = [params.get("custom_params") for params in each]
        exchange.comments = any(asked(custom, "eta_comments") is True for custom in customs)
        shown = {i: one for i, one in self.files.shown().items() if one.takes_requests}
        if (pinned := getattr(obj, "routed_dp_rank", None)) is not None:
            shown = {i: one for i, one in shown.items() if i == pinned}
        effort = getattr(obj, EFFORT, None)
        budgets: list[Budget | None] = [None if effort is None else (effort, "effort")] * len(each)
        if shown:
            instances = list(shown.values())
            if all(one.has_backlog(tenant) for one in instances):
                self._cap(obj, each, budgets, instances)
            exchange.estimate = self._estimate(obj, instances, tenant)
            idle = any(one.idle for one in instances)
            self._refuse_if_late(exchange, customs, idle=idle)
        exchange.budgets = budgets
        for budget in budgets:
            if budget is not None:
                self._count("capped", budget[1])

    def _estimate(self, obj: Any, shown: list[Shown], tenant: str) -> Estimate:
        """Where placement goes by the forecast, of the best instance; else of the worst."""
        thinks = bool(getattr(obj, "require_reasoning", False))
        budgets = [budget_of(obj, params) for params in _sampling_params(obj)]
        known = [budget for budget in budgets if budget is not None]
        limit = max(known) + 1 if len(known) == len(budgets) and known else math.inf
        prompt = _prompt_tokens(obj)
        found = [
            each.estimate(each.prompt if prompt is None else prompt, thinks=thinks, limit=limit)
            for each in (one.arrival_of(tenant) for one in shown)
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
        exchange.retry_s = min(max(math.ceil(expected_s - most_s), RETRY_S[0]), RETRY_S[1])
        exchange.refusal = (
            f"An answer would begin in about {expected_s:.1f} s, later than {whose} of "
            f"{most_s:g} s. Try again in {exchange.retry_s} s."
        )
        raise Overloaded(exchange.refusal)

    def _cap(
        self,
        obj: Any,
        each: Sequence[dict[str, Any]],
        budgets: list[Budget | None],
        shown: list[Shown],
    ) -> None:
        """Brownout under backlog: give thinking a budget where it has none. each: the sampling
        parameters of the requests. budgets: what they got; to be filled in."""
        level = self.config.brownout
        if level == "off" or not getattr(obj, "require_reasoning", False):
            return
        budget = max(LEAST_BUDGET, int(max(one.thinking[level] for one in shown)))
        for number, params in enumerate(each):
            if asked(params.get("custom_params"), "brownout") is False:
                continue
            if give_budget(obj, params, budget):
                budgets[number] = (budget, "brownout")

    def _count(self, name: str, why: str) -> None:
        self.counts[name][why] += 1
        if self.metrics is not None:
            self.metrics.count(name, why)

    def seconds_left(self, exchange: Exchange) -> tuple[float, float] | None:
        """The median and the P90 of a request that thinks, from now on."""
        rids = getattr(exchange.request, "rid", None)
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
        """For `GET /pascal/status`: requests refused and capped, by reason, and by which forecasts
        this process decides. An instance shows those a moment after it has made them."""
        forecasts = {
            str(instance): {"idle": one.idle, "backlog_share": round(one.arrival.waits, 3)}
            for instance, one in self.files.shown().items()
        }
        return {name: dict(counts) for name, counts in self.counts.items()} | {
            "forecasts": forecasts
        }


_active: AnswerEta | None = None


def activate(
    config: PascalConfig, states: Callable[[], list[str]], metrics: FrontendMetrics | None
) -> None:
    """Forecast for clients of this process from now on, if instances do."""
    global _active
    folder = os.environ.get(FOLDER_ENV)
    files = None if folder is None else ForecastFiles(Path(folder), states)
    _active = None if files is None else AnswerEta(config, files, metrics)


def reconfigure(config: PascalConfig) -> None:
    """Decide on later requests by another configuration."""
    if _active is not None:
        _active.config = config


def active() -> AnswerEta | None:
    """What decides in this process; None where no instance forecasts."""
    return _active


def describe() -> dict[str, Any] | None:
    return None if _active is None else _active.describe()


def decide(obj: Any, tenant: str = "") -> None:
    """Decide on a request that has been parsed; see `AnswerEta.decide`."""
    if _active is not None:
        _active.decide(obj, tenant)


def exchange() -> Exchange | None:
    """The HTTP request of this context."""
    return _exchange.get()


@contextmanager
def taking_part(exchange: Exchange) -> Iterator[None]:
    """The HTTP request of this context, and of those that begin in it, is this one."""
    token = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(token)


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


def _ask_for_comments(each: Sequence[dict[str, Any]]) -> None:
    """Note in sampling parameters what a header asked for: schedulers tell those apart that did."""
    for params in each:
        custom = params.get("custom_params")
        custom = {} if custom is None else custom
        own = {} if not isinstance(custom, dict) else custom.get("pascal", {})
        if isinstance(custom, dict) and isinstance(own, dict) and "eta_comments" not in own:
            params["custom_params"] = {**custom, "pascal": {**own, "eta_comments": True}}


def _prompt_tokens(obj: Any) -> int | None:
    """Of the longest prompt, about; None where nothing says it."""
    ids = getattr(obj, "input_ids", None)
    if isinstance(ids, list) and ids:
        return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
    text = getattr(obj, "text", None)
    texts = text if isinstance(text, list) else [text]
    known = [len(each) for each in texts if isinstance(each, str)]
    return max(known) // TOKEN_CHARACTERS if known else None
