"""The observation of passes, which touches little, against one that looks at everything always."""

import dataclasses
import types
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.migration.request_snapshot import (
    export_state,
    import_state,
    read_snapshot,
    restore_state,
)
from pascal_sglang.engine.observability.phases import PhaseTracker, describe, progress_of, qoe_of
from pascal_sglang.engine.request_states import RequestStates
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.ranking import PassInfo, Tuning, fastest_pace, urgent_at
from pascal_sglang.policy.request import RequestState
from pascal_sglang.policy.timeline import Phase, PhaseTimeline

START, END = [3, 4], [7]
CONFIG = PascalConfig()
SCHEDULER = types.SimpleNamespace(
    model_config=types.SimpleNamespace(hf_eos_token_id={1}, vocab_size=300),
    disaggregation_mode=DisaggregationMode.NULL,
    enable_priority_scheduling=False,
    metrics_reporter=types.SimpleNamespace(enable_metrics=False),
    tokenizer=None,
    spec_algorithm=SpeculativeAlgorithm.NONE,
)


class Stream:
    """A request on the engine, the tokens it is going to get, and its eager observer."""

    def __init__(self, rid, kind, thinking, answer, cut, tpot_ms, stream, arrival):
        opening = {"plain": [], "thinks": [9], "opens": START}[kind]
        thoughts = [] if kind == "plain" else [*opening, *[9] * thinking, *END]
        self.kind, self.to_come = kind, [*thoughts, *[9] * answer]
        del self.to_come[max(1, len(self.to_come) - cut) :]
        params = SamplingParams(max_new_tokens=len(self.to_come))
        if tpot_ms is not None:
            params.custom_params = {"pascal": {"answer_tpot_ms": tpot_ms}}
        self.req = Req(rid, None, array("q", [5, 6]), params, stream=stream, vocab_size=300)
        # Who names a pace is a human too.
        self.human = stream or tpot_ms is not None
        self.timeline = PhaseTimeline(arrival)
        self.pacer = Pacer(CONFIG.answer_tpot_ms_of(params.custom_params) / 1000)
        self.phase = Phase.REASONING

    def step(self, count):
        """`count` tokens more, as SGLang accounts for them; the last may be beyond the end."""
        req, new = self.req, self.to_come[:count]
        if req.finished() or not count:
            return
        del self.to_come[:count]
        new += [*END, 9, 9, 9][: count - len(new)]
        req.output_ids.extend(new)
        if self.kind == "thinks":
            req.update_reasoning_tokens(new, END)
        elif self.kind == "opens":
            req.update_self_opened_reasoning_tokens(new, START, END)
        if not self.to_come:
            req.finished_len = req.sampling_params.max_new_tokens
            req.finished_reason = FINISH_LENGTH(length=req.finished_len)

    def observe(self, pass_info, now):
        """Account for a pass; whether the thinking has ended in it and the answer goes on."""
        timeline = self.timeline
        timeline.observe(now, progress_of(self.req))
        new = timeline.answer_tokens - self.pacer.delivered
        if self.human and timeline.finished is None and new:
            floor = fastest_pace(CONFIG.answer_tpot_ms / 1000, pass_info)
            self.pacer.deliver(pass_info.now, new, floor=floor)
        answers = timeline.reasoning_end is not None
        ended_thinking = answers and self.phase is Phase.REASONING and timeline.reasoning_tokens > 0
        self.phase = Phase.ANSWERING if answers else Phase.REASONING
        if self.req.finished():
            timeline.finish(now)
        return ended_thinking and not self.req.finished()

    def migrate(self, states):
        state = export_state(self.req, 0.0)
        snapshot = read_snapshot(state, self.req.seqlen - 1, longest=1 << 20)
        self.req = import_state(SCHEDULER, snapshot)
        states.arrived(self.req)
        restore_state(self.req, snapshot)

    def check(self, now):
        state, timeline = self.req.pascal_state, self.timeline
        assert self.req.pascal_timeline == timeline
        assert state.phase is self.phase
        answers = self.phase is Phase.ANSWERING
        counts = timeline.answer_tokens if answers else timeline.reasoning_tokens
        assert state.phase_tokens == counts
        assert state.total_tokens == timeline.reasoning_tokens + timeline.answer_tokens
        pacer, eager = state.pacer, self.pacer
        assert bool(pacer.delivered) == bool(eager.delivered)
        assert pacer.slack(now) == pytest.approx(eager.slack(now))
        assert pacer.shown == pytest.approx(eager.shown)
        if eager.delivered:
            assert urgent_at(state, Tuning()) == pytest.approx(
                eager.shown + (1 - Tuning().guard) * eager.pace
            )
            assert qoe_of(self.req) == pytest.approx(eager.qoe)
        else:
            assert qoe_of(self.req) is None
        pacer = dataclasses.replace(pacer)
        pacer.settle()
        assert pacer.delivered == eager.delivered
        assert pacer.pace == eager.pace
        for name in ("first_shown", "last_shown", "delay", "ahead"):
            assert getattr(pacer, name) == pytest.approx(getattr(eager, name), abs=1e-9), name
        assert describe(self.req)["qoe"] == qoe_of(self.req)


requests = st.tuples(
    st.sampled_from(["plain", "thinks", "opens"]),
    st.integers(0, 6),
    st.integers(1, 40),
    st.integers(0, 10),
    st.sampled_from([None, None, 10, 50, 400]),
    st.sampled_from([True, True, False]),  # whether it is streamed
)
# What a request does in a pass: how many tokens come, or why none can.
turns = st.sampled_from([0, 1, 1, 1, 1, 2, 4, "paused", "migrates"])
passes = st.tuples(
    st.sampled_from([0.0, 0.01, 0.02, 0.1, 0.3, 2.0]),  # seconds since the last one
    st.sampled_from([0.01, 0.04, 0.2]),  # the recent length of a pass
    st.lists(turns, min_size=3, max_size=3),
    st.booleans(),  # whether somebody looks at the requests after it
)


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, min_size=3, max_size=3), st.lists(passes, min_size=5, max_size=60))
def test_states_are_those_of_an_observer_who_looks_at_everything(kinds, script):
    states = RequestStates(SCHEDULER, CONFIG, None, None, None)
    told: list[Req] = []
    tracker = PhaseTracker(None, lambda live, _over, _now: told.extend(states.observe(live)))
    streams = [Stream(str(i), *kind, arrival=1.0) for i, kind in enumerate(kinds)]
    for stream in streams:
        tracker.arrived(stream.req, 1.0)
        states.arrived(stream.req)
    now = 2.0
    for number, (gap, pass_s, doing, looks) in enumerate(script):
        now += gap
        states.pass_info = pass_info = PassInfo(number, now, pass_s)
        took_part = []
        for stream, turn in zip(streams, doing, strict=True):
            if turn == "migrates" and stream.req.output_ids and not stream.req.finished():
                stream.migrate(states)
            elif turn == "paused":
                for timeline in (stream.timeline, stream.req.pascal_timeline):
                    timeline.stopped("paused", now)
            elif isinstance(turn, int):
                for timeline in (stream.timeline, stream.req.pascal_timeline):
                    timeline.went_on(now)
                stream.step(turn)
                took_part.append(stream)
        came = now + 0.005
        tracker.observe([stream.req for stream in took_part], came)
        live = [stream for stream in took_part if stream.timeline.finished is None]
        assert told == [stream.req for stream in live if stream.observe(pass_info, came)]
        told.clear()
        for stream in streams if looks else ():
            stream.check(now)
    ended = [stream for stream in streams if stream.timeline.finished is not None]
    for stream in streams:
        stream.check(now)
    outcomes = [bool(stream.timeline.answer_tokens) for stream in ended]
    assert tracker.outcomes["answered"] == sum(outcomes)
    assert tracker.outcomes["no_answer"] == len(outcomes) - sum(outcomes)


def test_tokens_of_a_pass_are_counted_where_drafts_bring_several():
    """A request's first pass is a prefill; a pass in which it got no token says nothing."""
    drafting = {**vars(SCHEDULER), "spec_algorithm": SpeculativeAlgorithm.EAGLE}
    reading = types.SimpleNamespace(**drafting)
    states = RequestStates(reading, CONFIG, None, None, None)
    states.pass_info = PassInfo(0, 0.0, 0.02)
    req = types.SimpleNamespace(
        pascal_state=RequestState(0, Pacer(0.04)),
        pascal_timeline=PhaseTimeline(0.0, reasoning_end=1.0, first_answer=1.0, answer_tokens=1),
    )
    for tokens, mean in ((1, 1.0), (4, 1.2), (4, 1.2), (5, 1.18)):
        req.pascal_timeline.answer_tokens = tokens
        states._count_pass_tokens([req])
        req.pascal_state.total_tokens = tokens
        assert states.pass_tokens == pytest.approx(mean)


def test_the_fastest_pace_is_that_of_the_tokens_that_passes_bring():
    assert fastest_pace(0.1, PassInfo(1, 0.0, 0.02)) == pytest.approx(0.04)
    assert fastest_pace(0.1, PassInfo(1, 0.0, 0.02, tokens=4.0)) == pytest.approx(0.01)
