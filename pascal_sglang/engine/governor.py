"""Carries out the policy's plan on a live scheduler, one pass at a time."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from typing import Any

import psutil
import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.ladder import Ladder
from pascal_sglang.engine.metrics import PauseMetrics
from pascal_sglang.engine.phases import timeline_of
from pascal_sglang.policy.member import Member, Place
from pascal_sglang.policy.order import ORDERS, Moment, Tuning
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import Plan, Planner, Room
from pascal_sglang.policy.timeline import Phase

logger = logging.getLogger(__name__)

RECOUNT_PASSES = 512
ERRORS_LOGGED = 5


class Governor:
    """Builds the policy's view, executes its plan, keeps the members true.

    Every decision is a function of the request stream, the KV pool and the clock of TP rank 0, so
    all TP ranks decide alike.
    """

    def __init__(self, scheduler: Any, config: PascalConfig, host_budget_tokens: int) -> None:
        self.scheduler = scheduler
        self.config = config
        self.ladder = Ladder(scheduler, host_budget_tokens)
        self.planner = Planner(
            ORDERS[config.policy],
            Tuning(quantum=config.quantum_tokens, demote=config.demote_tokens),
        )
        self.moment = Moment(0, 0.0, 0.0)
        self.errors = 0
        self.unpausable: Counter[str] = Counter()
        self._chaos = random.Random(0) if config.chaos else None
        self.metrics: PauseMetrics | None = None
        self._arrivals = 0
        self._admitted: list[Req] = []

    def arrived(self, req: Req) -> None:
        """Make the request's member; its reader's pace may come with the request."""
        tpot_ms = self.config.answer_tpot_ms
        custom = req.sampling_params.custom_params
        if isinstance(custom, dict) and isinstance(own := custom.get("pascal"), dict):
            asked = own.get("answer_tpot_ms")
            if isinstance(asked, int | float) and asked > 0:
                tpot_ms = asked
        self._arrivals += 1
        member = Member(seq=self._arrivals, pacer=Pacer(tpot_ms / 1000), handle=req)
        reason = why_not_pausable(req)
        if reason:
            member.pausable = False
            if not self.unpausable[reason]:
                logger.warning("pascal_sglang does not pause requests with %s", reason)
            self.unpausable[reason] += 1
        req.pascal_member = member

    def govern(self, running: ScheduleBatch, last: ScheduleBatch | None) -> ScheduleBatch:
        """Begin a pass. An error of ours is logged and counted, and SGLang's order stands in."""
        self.tick(self._clock())
        try:
            running = self.before_batch(running, last)
        except Exception:
            self.errors += 1
            if self.errors <= ERRORS_LOGGED:
                logger.exception("pascal_sglang: the policy failed; SGLang's own order stands in")
            self._admitted = list(self.scheduler.waiting_queue)
        if self.metrics is not None:
            self.metrics.update(self.ladder.counts, len(self.ladder.paused), self.errors)
        return running

    def _clock(self) -> float:
        return agree(self.scheduler, time.perf_counter())

    def tick(self, now: float) -> None:
        """A new pass begins; `now` is TP rank 0's clock in seconds."""
        last = self.moment
        step = now - last.now if last.now and now > last.now else 0.0
        # Only passes of a busy engine say how long a step takes.
        pass_s = 0.9 * last.pass_s + 0.1 * step if step < 1.0 else last.pass_s
        self.moment = Moment(last.pass_no + 1, now, pass_s)

    def before_batch(self, running: ScheduleBatch, last: ScheduleBatch | None) -> ScheduleBatch:
        """Settle pauses, plan, pause and resume; the running batch to go on with."""
        moment = self.moment
        paused, dropped = self.ladder.settle()
        for req in paused:
            self._stopped(req, Place.HOST)
        for req in dropped:
            self.scheduler.waiting_queue.append(req)
            self._stopped(req, Place.WAITING)
        if moment.pass_no % RECOUNT_PASSES == 0:
            self._recount()
        going_on = [r for r in running.reqs if not r.finished()]
        # A request told to end does so in its next step; pausing it would only keep it.
        members = [member_of(r) for r in going_on if r.to_finish is None]
        joining = len(_extended(last, self.scheduler.chunked_req)) + len(going_on) - len(members)
        for member in members:
            member.kv_tokens = member.handle.kv.kv_committed_len
        plan = self.planner.plan(members, self._room(running), moment, joining)
        if self._chaos is not None:
            plan = self._shake(plan, members)
        if plan.pause:
            self.ladder.leave([m.handle for m in plan.pause], running)
        self._admitted = []
        for member in plan.start:
            req = member.handle
            if member.place is Place.WAITING:
                self._admitted.append(req)
                continue
            keep = self._promised_tokens() + len(running.reqs) + joining + 1
            batch = self.ladder.resume(req) if self.ladder.can_resume(req, keep) else None
            if batch is None:
                break
            self.planner.started(member, moment)
            running = self._merge(running, batch)
        return running

    def queued(self, req: Req) -> None:
        """The request entered the waiting queue, for the first time or after a retraction."""
        self._stopped(req, Place.WAITING)

    def _stopped(self, req: Req, place: Place) -> None:
        member = member_of(req)
        if place is Place.HOST:
            member.kv_tokens = self.ladder.paused[req].tokens
        else:
            member.kv_tokens = len(req.origin_input_ids) + len(req.output_ids)
        self.planner.stopped(member, place, self.moment)

    def gone(self, req: Req) -> None:
        """The request ended outside the running batch."""
        self.planner.line.remove(member_of(req))

    def _recount(self) -> None:
        """Make the line anew from the queues themselves, in case SGLang moved somebody past us."""
        line = self.planner.line
        line.clear()
        for req in (*self.scheduler.waiting_queue, *self.ladder.paused):
            line.add(member_of(req))

    def admitted(self, waiting: list[Req]) -> tuple[list[Req], list[Req]]:
        """Split the waiting queue into who may be prefilled now, best first, and the rest."""
        if not self._admitted:
            return [], waiting
        queued = set(waiting)
        chosen = [req for req in self._admitted if req in queued]
        taken = set(chosen)
        return chosen, [req for req in waiting if req not in taken]

    def prefilled(self, req: Req) -> None:
        """The engine took the request into a prefill batch."""
        self.planner.started(member_of(req), self.moment)

    def observe(self, req: Req) -> None:
        """The request may have produced tokens: bring its member up to date, tell its reader."""
        member, timeline = member_of(req), timeline_of(req)
        if new := timeline.answer_tokens - member.pacer.delivered:
            member.pacer.deliver(self.moment.now, new)
        answering = timeline.phase is Phase.ANSWERING
        if answering and member.phase is Phase.REASONING:
            member.phase = Phase.ANSWERING
            member.credit = 0
        member.phase_tokens = timeline.answer_tokens if answering else timeline.reasoning_tokens
        member.total_tokens = timeline.reasoning_tokens + timeline.answer_tokens

    def _merge(self, running: ScheduleBatch, batch: ScheduleBatch) -> ScheduleBatch:
        if running.is_empty():
            return batch
        running.merge_batch(batch)
        running.batch_is_full = False
        return running

    def _room(self, running: ScheduleBatch) -> Room:
        scheduler = self.scheduler
        return Room(
            free_tokens=self.ladder.free_tokens - self._promised_tokens(),
            releasing_tokens=self.ladder.releasing_tokens,
            slots=min(
                scheduler.get_num_allocatable_reqs(len(running.reqs), running_batch=running),
                scheduler.max_running_requests - len(running.reqs),
            )
            + len(self.ladder.leaving),
        )

    def _promised_tokens(self) -> int:
        """KV the rest of a chunked prefill will take: SGLang goes on with it unasked."""
        chunked = self.scheduler.chunked_req
        if chunked is None:
            return 0
        whole = len(chunked.origin_input_ids) + len(chunked.output_ids)
        return max(0, whole - chunked.kv.kv_committed_len)

    def _shake(self, plan: Plan, running: list[Member]) -> Plan:
        """Pause and hold back at random, on top of the plan."""
        assert self._chaos is not None
        chance, roll = self.config.chaos, self._chaos.random
        pause = list(plan.pause)
        pause += [m for m in running if m.pausable and m not in plan.pause and roll() < chance]
        start = tuple(m for m in plan.start if roll() >= chance)
        return Plan(start, tuple(pause))


def build_governor(scheduler: Any, config: PascalConfig) -> Governor | None:
    """The governor of a scheduler; None under `fcfs`."""
    if config.policy == "fcfs" or not scheduler.is_generation:
        return None
    carried = not (scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm or scheduler.attn_dp_enabled)
    if not carried:
        raise RuntimeError(
            f"policy {config.policy} does not work with hybrid KV pools or DP attention yet; "
            "use --pascal-policy fcfs"
        )
    capacity = scheduler.max_total_num_tokens
    kv_bytes = scheduler.token_to_kv_pool_allocator.get_kvcache().mem_usage * 2**30
    parallel = get_parallel()
    ranks = parallel.dp_size * parallel.tp_size
    budget = (
        min(4 * kv_bytes, psutil.virtual_memory().available / 4 / ranks)
        if config.host_kv_gb is None
        else config.host_kv_gb * 2**30 / parallel.tp_size
    )
    tokens = agree(scheduler, budget * capacity / max(kv_bytes, 1))
    return Governor(scheduler, config, int(tokens))


def agree(scheduler: Any, value: float) -> float:
    """TP rank 0's value on every rank: what differs between ranks must not reach a decision."""
    group = scheduler.tp_cpu_group
    if torch.distributed.get_world_size(group) == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    torch.distributed.broadcast(
        shared, src=torch.distributed.get_global_rank(group, 0), group=group
    )
    return float(shared)


def member_of(req: Req) -> Member:
    member: Member = req.pascal_member
    return member


def _extended(last: ScheduleBatch | None, chunked: Req | None) -> list[Req]:
    """Requests whose prefill has just run and who join the running batch in this pass, and the one
    still being prefilled in chunks."""
    fresh = []
    if last is not None and last.forward_mode.is_extend():
        fresh = [r for r in last.reqs if not r.finished() and r is not chunked]
    return fresh if chunked is None else [*fresh, chunked]


def why_not_pausable(req: Req) -> str | None:
    """What about the request the ladder cannot carry; None if it can be paused."""
    params = req.sampling_params
    reasons = {
        "beam search": req.beam_group is not None,
        "a session": req.session is not None or req.session_id is not None,
        "multimodal inputs": req.multimodal_inputs is not None,
        "input embeddings": req.input_embeds is not None,
        "a LoRA adapter": req.lora_id is not None,
        "hidden states returned": bool(req.return_hidden_states),
        "a grammar": any((params.json_schema, params.regex, params.ebnf, params.structural_tag)),
        "penalties": bool(
            params.frequency_penalty
            or params.presence_penalty
            or params.repetition_penalty != 1.0
            or params.min_new_tokens
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
