"""Which instance takes a new request, and whether a request moves at the end of its thinking.

Source: the paper's Algorithms 1 and 2 with the adaptive override; `PlacementRule` has what `pascal`
changes. Where instances are on several hosts, a request that moves goes to a near one among those
whose loads are alike. All ties go to the instance asked first by `_turn`, which rotates, so that
equal instances share.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields

from pascal_sglang.policy.site import FAR, UNKNOWN, Site

NO_HITS: Mapping[int, int] = {}

# Thinking tokens a new request is expected to need.
THINKING_TOKENS = 1000
# Part of a decode step that grows with the requests in it; the rest reads weights and launches.
GROWING_SHARE = 0.25
# What a whole pool of KV, held or paused in host memory, adds to the time until an answer: it will
# be wanted. Without it long prompts pile up where passes are still short; found by simulation.
HELD_SHARE = 0.25
# Loads are alike within this share of the best one.
ALIKE = 0.25
# More requests than an instance takes: for models that have nothing but KV.
NO_LIMIT = 1 << 30


@dataclass(slots=True, kw_only=True)
class LoadFigures:
    """What an instance says of itself; token counts unless said otherwise."""

    # `t_i`: its answers meet their SLO now.
    on_pace: bool = True
    # `m_i`: KV on the device and in host memory. Where recurrent states or entries of sliding
    # windows are scarcer than KV, their share of their pool counts instead.
    footprint: int = 0
    # `r_i`: requests that reason in the high class.
    reasoning: int = 0
    # `a_i`: answering requests inside their first quantum.
    fresh: int = 0
    # KV free or evictable.
    free: int = 0
    # More requests for which there are recurrent states and sliding windows.
    fits: int = NO_LIMIT
    # Prompt tokens not yet started.
    waiting: int = 0
    # KV tokens of the device.
    capacity: int = 0
    # Requests that run there, wait, or are on their way.
    load: int = 0
    # Recent length of a pass in microseconds, with `batch` requests in it.
    pass_us: int = 0
    batch: int = 0
    # Recent time per prefilled token in nanoseconds.
    prefill_ns: int = 0


FIGURES = tuple(figure.name for figure in fields(LoadFigures))


@dataclass(slots=True)
class Instance(LoadFigures):
    """What the controller knows of one instance."""

    index: int
    # KV reserved for requests on their way to it, in tokens.
    arriving: int = 0
    # Migrations under way, either way.
    migrations: int = 0
    # Where it is.
    site: Site = UNKNOWN

    @property
    def left(self) -> int:
        """KV that is free and nobody has a claim to yet."""
        return self.free - self.waiting - self.arriving


@dataclass(frozen=True, slots=True)
class Answer:
    """A request at its end-of-thinking token.

    kv_tokens: KV it holds. remaining: the most answering tokens it can still produce. likely: how
    many it probably will; None if nothing is known. passes: scheduling passes that a move takes,
    and so tokens that it answers meanwhile.
    """

    current: int
    kv_tokens: int
    remaining: int
    likely: int | None = None
    passes: int = 8


@dataclass(frozen=True, slots=True)
class Decision:
    """`target` is the current instance where the request stays; `why` is a metric label."""

    target: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRule:
    """How a policy places requests, and whether and when it moves them."""

    # Requests may move at the end of their thinking, unless `--pascal-migration` says otherwise.
    migrates: bool = False
    # Move only from memory pressure to room; otherwise by the paper's counts (Algorithm 2).
    lazy: bool = True
    # New requests go where their answer is expected to begin first, instead of to the smallest KV
    # footprint (Algorithm 1).
    predict: bool = True
    # An instance is on pace while the running QoE of its answers holds (the paper's status);
    # otherwise while none of its readers waits.
    running_qoe: bool = False


class Placement:
    """Decides, and keeps the loads true between two load reports: what was just decided counts
    at once, so that a burst is not sent to one instance (herding)."""

    def __init__(
        self,
        *,
        quantum: int,
        lazy: bool,
        adaptive: bool = True,
        max_migrations: int = 4,
        sight: int = 16,
        predict: bool = False,
        near: bool = True,
        reach: int = FAR,
    ) -> None:
        """quantum: tokens of growth that "enough memory" includes. lazy, predict: see
        `PlacementRule`. adaptive: stay where there is memory and the target has none.
        max_migrations: at once per instance. sight: instances looked at for one decision, so that
        its cost does not grow with their number. near: of alike targets take a near one.
        reach: how far KV can move (`policy.site`)."""
        self.quantum = quantum
        self.lazy = lazy
        self.adaptive = adaptive
        self.max_migrations = max_migrations
        self.sight = sight
        self.predict = predict
        self.near = near
        self.reach = reach
        self._turn = 0

    def in_sight(
        self,
        instances: Sequence[Instance],
        also: Container[int] = (),
        source: Instance | None = None,
    ) -> Sequence[Instance]:
        """Those to decide among: all, or as many of them in turn as `sight` says. also: indices of
        instances that are looked at in any case. source: the instance that a request leaves; as
        many others of its host, where that is known, are looked at too."""
        count = len(instances)
        if count <= self.sight:
            return instances
        begin = self._turn * self.sight % count
        found = [*instances[begin : begin + self.sight]]
        found += instances[: self.sight - len(found)]
        if also:
            seen = {i.index for i in found}
            found += [i for i in instances if i.index in also and i.index not in seen]
        if self.near and source is not None and source.site.host:
            seen = {i.index for i in found}
            beside = [i for i in instances if i.site == source.site and i.index not in seen]
            begin = self._turn * self.sight % max(1, len(beside))
            found += (beside[begin:] + beside[:begin])[: self.sight]
        return found

    def place(
        self,
        instances: Sequence[Instance],
        prompt: int,
        hits: Mapping[int, int] = NO_HITS,
        source: Instance | None = None,
    ) -> int:
        """Algorithm 1: the smallest footprint among instances whose answers are on pace, or among
        all if none is; or the earliest answer. hits: tokens of the prompt that an instance holds
        already; they weigh against its footprint, and save their prefill. source: the instance that
        the request leaves, from which its KV comes."""
        turn, count, held = self._turn, len(instances), hits.get
        usual = _usual_pass(instances)
        weight = self._until_answer if self.predict else self._footprint
        # False comes first: those on pace, if there are any.
        chosen = min(
            instances,
            key=lambda i: (
                not i.on_pace,
                weight(i, held(i.index, 0), usual),
                (i.index - turn) % count,
            ),
        )
        if source is not None and self._has_near(instances, source):
            most = (1 + ALIKE) * weight(chosen, held(chosen.index, 0), usual)
            alike = [
                i
                for i in instances
                if i.on_pace == chosen.on_pace and weight(i, held(i.index, 0), usual) <= most
            ]
            chosen = min(
                alike or [chosen],
                key=lambda i: (
                    source.site.distance(i.site),
                    weight(i, held(i.index, 0), usual),
                    (i.index - turn) % count,
                ),
            )
        self._turn += 1
        chosen.reasoning += 1
        chosen.load += 1
        chosen.fits = max(0, chosen.fits - 1)
        chosen.waiting += max(0, prompt - hits.get(chosen.index, 0))
        return chosen.index

    def _footprint(self, instance: Instance, held: int, usual: tuple[float, float]) -> float:
        return instance.footprint + instance.waiting - held

    def _until_answer(self, instance: Instance, held: int, usual: tuple[float, float]) -> float:
        """Microseconds until an answer could begin there, more if much KV waits to go on."""
        left = instance.waiting - held
        alone = THINKING_TOKENS * _pass_us(instance, usual) + left * instance.prefill_ns / 1000
        return alone * (1 + HELD_SHARE * (instance.footprint + left) / max(1, instance.capacity))

    def reachable(self, instances: Sequence[Instance], source: Instance) -> Sequence[Instance]:
        """Those to which the KV of a request on `source` can move."""
        if self.reach == FAR:
            return instances
        return [i for i in instances if source.site.distance(i.site) <= self.reach]

    def _has_near(self, instances: Sequence[Instance], source: Instance) -> bool:
        """Whether it matters where the instances are."""
        return self.near and len({source.site.distance(i.site) for i in instances}) > 1

    def at_boundary(self, instances: Sequence[Instance], answer: Answer) -> Decision:
        """Algorithm 2 with the adaptive override, or the lazy rule."""
        here = next(i for i in instances if i.index == answer.current)
        instances = self.reachable(instances, here)
        # Its thinking is over: it no longer counts among its instance's thinkers.
        here.reasoning = max(0, here.reasoning - 1)
        decide = self._lazily if self.lazy else self._by_counts
        decision = decide(instances, here, answer)
        if decision.target != here.index:
            decision = self._if_worth_it(instances, here, answer, decision)
        target = next(i for i in instances if i.index == decision.target)
        target.fresh += 1
        if target is not here:
            here.migrations += 1
            target.migrations += 1
            target.arriving += answer.kv_tokens
            target.fits = max(0, target.fits - 1)
            target.footprint += answer.kv_tokens
        return decision

    def moved(self, source: Instance, target: Instance, kv_tokens: int, *, done: bool) -> None:
        """A move has ended: `done`, or the source goes on with the request."""
        source.migrations = max(0, source.migrations - 1)
        target.migrations = max(0, target.migrations - 1)
        target.arriving = max(0, target.arriving - kv_tokens)
        if not done:
            target.fits += 1
            target.footprint = max(0, target.footprint - kv_tokens)
            target.fresh = max(0, target.fresh - 1)
            source.fresh += 1

    def enough(self, instance: Instance, answer: Answer) -> bool:
        """Room for the answer and a quantum of growth. On its own instance its KV is paid."""
        comes = instance.index != answer.current
        if comes and not instance.fits:
            return False
        own = answer.kv_tokens if comes else 0
        return instance.left >= own + min(self.quantum, answer.remaining)

    def _by_counts(self, instances: Sequence[Instance], here: Instance, answer: Answer) -> Decision:
        on_pace = [i for i in instances if i.on_pace]
        turn, count = self._turn, len(instances)
        chosen = min(
            on_pace or instances,
            key=lambda i: (
                i.reasoning if on_pace else i.reasoning + i.fresh,
                i is not here,
                here.site.distance(i.site) if self.near else 0,
                (i.index - turn) % count,
            ),
        )
        if chosen is here:
            return Decision(here.index, "fewest_here")
        if self.adaptive and self.enough(here, answer) and not self.enough(chosen, answer):
            return Decision(here.index, "override")
        return Decision(chosen.index, "fewest_there" if on_pace else "none_on_pace")

    def _lazily(self, instances: Sequence[Instance], here: Instance, answer: Answer) -> Decision:
        if self.enough(here, answer):
            return Decision(here.index, "room_here")
        roomy = [i for i in instances if i is not here and self.enough(i, answer)]
        if not roomy:
            return Decision(here.index, "room_nowhere")
        chosen = min(roomy, key=lambda i: (not i.on_pace, -i.left, self._order(i, len(instances))))
        if self._has_near(roomy, here):
            least = (1 - ALIKE) * chosen.left
            alike = [i for i in roomy if i.on_pace == chosen.on_pace and i.left >= least]
            chosen = min(
                alike,
                key=lambda i: (
                    here.site.distance(i.site),
                    -i.left,
                    self._order(i, len(instances)),
                ),
            )
        return Decision(chosen.index, "room_there")

    def _if_worth_it(
        self,
        instances: Sequence[Instance],
        here: Instance,
        answer: Answer,
        decision: Decision,
    ) -> Decision:
        target = next(i for i in instances if i.index == decision.target)
        likely = answer.remaining if answer.likely is None else answer.likely
        if likely <= answer.passes:
            return Decision(here.index, "nearly_done")
        if max(here.migrations, target.migrations) >= self.max_migrations:
            return Decision(here.index, "too_many_moves")
        return decision

    def _order(self, instance: Instance, count: int) -> int:
        return (instance.index - self._turn) % count


def _usual_pass(instances: Sequence[Instance]) -> tuple[float, float]:
    """Mean length of a pass in microseconds, and requests in it, as measured by those at work, or
    by anybody."""
    measured = [i for i in instances if i.pass_us and i.load] or [i for i in instances if i.pass_us]
    if not measured:
        return 1.0, 1.0
    count = len(measured)
    return sum(i.pass_us for i in measured) / count, sum(i.batch for i in measured) / count


def _pass_us(instance: Instance, usual: tuple[float, float]) -> float:
    """How long a pass takes there with everybody who is there or on the way.

    What an instance has measured lags behind a burst, and one long pass marks it for some time. It
    counts as far as it was measured with as many requests as there are now, not at all with half or
    twice as many; else their number does.
    """
    pass_us, batch = usual
    by_load = pass_us * (1 + GROWING_SHARE * (instance.load - batch) / max(1.0, batch))
    if not instance.pass_us:
        return by_load
    fewer, more = sorted((instance.load, instance.batch))
    trust = max(0.0, 2 * fewer / max(1, more) - 1)
    return trust * instance.pass_us + (1 - trust) * by_load
