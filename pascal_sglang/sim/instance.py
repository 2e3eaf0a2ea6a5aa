"""One instance: passes of prefill and decode, jumped over until something has to be decided."""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import deque
from typing import Protocol

from pascal_sglang.policy.rank_forecast import NEVER, RankForecast
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.batch import Batch
from pascal_sglang.sim.clock import Clock
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.memory import Memory
from pascal_sglang.sim.passes import Passes
from pascal_sglang.sim.readers import Readers
from pascal_sglang.sim.request import SimRequest


class Listener(Protocol):
    """Who hears what becomes of requests."""

    def thought(self, instance: Instance, request: SimRequest) -> bool:
        """Its thinking has ended; whether it stops here, to move."""

    def ended(self, instance: Instance, request: SimRequest) -> None: ...


class Instance(ABC):
    """What every scheduler shares. Decisions are taken between two passes, in `decide`.

    stirred: something has changed since the last decision. look: the step after which to decide
    even so. step_by_step: decide in every pass, which jumping must not differ from.
    """

    def __init__(
        self,
        index: int,
        cost: Cost,
        clock: Clock,
        listener: Listener,
        *,
        tuning: Tuning,
        forecast: RankForecast,
        readers_sticky: bool,
        slo: float,
        tpot: float,
        step_by_step: bool = False,
    ) -> None:
        self.index = index
        self.cost = cost
        self.clock = clock
        self.listener = listener
        self.tuning = tuning
        self.forecast = forecast
        self.step_by_step = step_by_step
        self.batch = Batch(cost)
        self.memory = Memory(cost.capacity, cost.host)
        self.readers = Readers(self.batch, sticky=readers_sticky, slo=slo)
        self.thinking: dict[SimRequest, None] = {}
        self.fresh: dict[SimRequest, None] = {}
        self.filling: deque[SimRequest] = deque()
        self.inbox: list[SimRequest] = []
        self.stirred = False
        self.again = False
        self.look = NEVER
        self.prefilled_last = False
        self.passes = Passes()
        self.tokens = 0
        self.prefilled_tokens = 0
        self.recomputed_tokens = 0
        self.busy_s = 0.0
        self._notice_s = tpot / 2
        self._hold_s = 0.0
        self._filled: list[SimRequest] | None = None
        self._marks: list[tuple[int, int, SimRequest]] = []
        self._marked = 0
        self._alarm = (math.inf, 0)
        self._version = 0

    @abstractmethod
    def decide(self) -> None:
        """Before a pass: start and pause requests."""

    @abstractmethod
    def may_prefill(self) -> bool:
        """Whether a prefill pass may be the next one."""

    @abstractmethod
    def next_look(self) -> int:
        """The decode step after which a decision is due even if nothing happens."""

    @abstractmethod
    def waiting(self) -> tuple[int, int, int]:
        """Requests that do not run: those that think, all, and prompt tokens of those not begun."""

    @property
    def prefill_token_s(self) -> float:
        """Seconds per prefilled token, as far as this instance has measured it."""
        return 0.0

    @property
    def pass_info(self) -> PassInfo:
        return PassInfo(self.passes.count, self.clock.now, self.passes.mean_s)

    def arrive(self, request: SimRequest) -> None:
        self.inbox.append(request)
        self.poke()

    def poke(self) -> None:
        """Decide at the next boundary between two passes."""
        self.stirred = True
        now, batch = self.clock.now, self.batch
        if self._filled is not None or now <= batch.origin:
            self._set_alarm(batch.origin, batch.steps)
        elif not batch:
            self._set_alarm(now, batch.steps)
        else:
            step = batch.steps_by(now) + 1
            self._set_alarm(batch.time_of(step), step)

    def catch_up(self) -> None:
        """Bring counts up to the present, between two decisions too."""
        self._advance(self.batch.steps_by(self.clock.now))

    def _set_alarm(self, when: float, step: int) -> None:
        if when < self._alarm[0]:
            self._alarm = (when, step)
            self._version += 1
            self.clock.at(when, self._ring, self._version)

    def _ring(self, version: int) -> None:
        if version != self._version:
            return
        step, self._alarm = self._alarm[1], (math.inf, 0)
        if self._filled is not None:
            self._end_prefill()
        self._advance(step)
        self.batch.origin = max(self.batch.origin, self.clock.now)
        marks = self._marks
        while marks and marks[0][0] <= self.batch.steps:
            due, _, request = heapq.heappop(marks)
            if request.due == due and request in self.batch:
                self.batch.sync(request)
                self.stirred = True
                if self._goes_on(request):
                    self.watch(request)
        self.decide()
        self._begin_pass()

    def _advance(self, step: int) -> None:
        batch = self.batch
        count = step - batch.steps
        if count <= 0:
            return
        begin = batch.origin
        made = batch.advance(step)
        self.memory.take(made)
        self.tokens += made
        self.busy_s += batch.origin - begin
        self.prefilled_last = False
        growth_s = batch.cost.kv_token_s * len(batch)
        self.passes.add(count, len(batch), batch.step_s - growth_s, growth_s)

    def _begin_pass(self) -> None:
        batch = self.batch
        if self._hold_s:
            self._hold_up(self._hold_s)
            self._hold_s = 0.0
        if self.filling and self.may_prefill():
            self._prefill()
            return
        if not batch:
            return
        ahead = batch.steps + 1
        if not (self.step_by_step or self.again or self.filling):
            ahead = self._next_mark()
            if grows_out := self._short_in():
                ahead = min(ahead, batch.steps + grows_out)
            self.look = self.next_look()
            ahead = max(batch.steps + 1, min(ahead, self.look))
        self._set_alarm(batch.time_of(ahead), ahead)

    def _next_mark(self) -> int:
        marks = self._marks
        while marks[0][2].due != marks[0][0] or marks[0][2] not in self.batch:
            heapq.heappop(marks)
        return marks[0][0]

    def _short_in(self) -> int:
        """Steps until there is no room left for those who run to grow."""
        reserve = self.reserve_steps()
        free = self.memory.free - reserve * self.joining()
        return max(1, free // len(self.batch) - reserve + 1)

    def joining(self) -> int:
        """Requests whose KV is on its way back to the device."""
        return 0

    def reserve_steps(self) -> int:
        """Steps of growth that have to be free for everybody who runs."""
        return 1

    def _hold_up(self, seconds: float) -> None:
        noticed = seconds > self._notice_s
        self.batch.hold_up(seconds, noticed=noticed)
        self.busy_s += seconds
        if noticed and self.forecast.paced:
            for request in self.batch:
                if request.phase is Phase.ANSWERING:
                    self.watch(request)

    def _prefill(self) -> None:
        """Begin a pass that prefills whoever is first, up to a chunk."""
        left, done = self.cost.chunk, []
        while self.filling and left > 0:
            request = self.filling[0]
            tokens = min(left, request.unfilled)
            request.unfilled -= tokens
            left -= tokens
            if request.unfilled:
                break
            done.append(self.filling.popleft())
        self._filled = done
        self.prefilled_last = True
        tokens = self.cost.chunk - left
        seconds = self.cost.prefill(tokens)
        self.prefilled_tokens += tokens
        self.passes.add(1, len(self.batch), seconds)
        self.has_prefilled(tokens, seconds)
        self._hold_up(seconds)
        self._set_alarm(self.batch.origin, self.batch.steps)

    def has_prefilled(self, tokens: int, seconds: float) -> None:  # noqa: B027
        """A prefill pass of so many tokens takes so long; nobody has to care."""

    def _end_prefill(self) -> None:
        done, self._filled = self._filled or [], None
        self.batch.origin = max(self.batch.origin, self.clock.now)
        self.stirred = True
        for request in done:
            self.tokens += 1
            request.total_tokens += 1
            request.phase_tokens += 1
            if request.first_token < 0:
                request.first_token = self.clock.now
            if request.phase is Phase.ANSWERING:
                request.pacer.deliver(self.clock.now, 1)
            self.join(request)
            if self._goes_on(request):
                self.watch(request)

    def join(self, request: SimRequest) -> None:
        """The job decodes from the next step on."""
        self.batch.join(request)
        if request.phase is Phase.REASONING:
            self.thinking[request] = None

    def leave(self, request: SimRequest) -> None:
        """The job, which has tokens to come, does not decode here any more."""
        self.batch.leave(request)
        self.thinking.pop(request, None)

    def forget(self, request: SimRequest) -> None:
        """The job has nothing to do with this instance any more."""
        self.readers.ends(request)
        self.fresh.pop(request, None)

    def answers_here(self, request: SimRequest) -> None:
        self.readers.begins(request)
        if request.phase_tokens < self.tuning.quantum:
            self.fresh[request] = None

    def watch(self, request: SimRequest) -> None:
        """Note when something happens next to a request that is up to date."""
        batch = self.batch
        first = request.phase is Phase.ANSWERING and not request.phase_tokens
        steps = 1 if first else request.left
        if not first or not self.forecast.paced:
            now, step_s = batch.origin, batch.step_s
            seen = self.forecast.steps(request, self.tuning, step_s, now, self.passes.mean_s)
            steps = min(steps, seen)
        due = batch.steps + steps
        if due != request.due:
            request.due = due
            self._marked += 1
            heapq.heappush(self._marks, (due, self._marked, request))

    def _goes_on(self, request: SimRequest) -> bool:
        """Take in that a request has reached the end of a phase, or not; whether it still runs."""
        now = self.clock.now
        if request.phase is Phase.REASONING:
            if request.left > 0:
                if self.forecast.demotes and self.demoted(request):
                    self.thinking.pop(request, None)
                return True
            request.phase, request.phase_tokens, request.credit = Phase.ANSWERING, 0, 0
            request.reasoning_end = now
            # Placement takes it from its instance's thinkers itself.
            moves = self.listener.thought(self, request)
            self.thinking.pop(request, None)
            self.answers_here(request)
            if moves:
                self.leave(request)
                return False
            return True
        if request.first_answer < 0 and request.phase_tokens:
            request.first_answer = now
            self.readers.look_later(request)
        if request.phase_tokens >= self.tuning.quantum:
            self.fresh.pop(request, None)
        if request.left > 0:
            return True
        self.leave(request)
        self.memory.give(request.held)
        self.forget(request)
        self.listener.ended(self, request)
        return False

    def demoted(self, request: SimRequest) -> bool:
        """Whether a thinker no longer counts among its instance's thinkers."""
        return False
