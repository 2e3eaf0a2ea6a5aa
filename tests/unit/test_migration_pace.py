"""Moves at the sizes of real KV, in virtual time: how long they take, and how long a reader waits.

Two schedulers take passes of 25 ms, not at the same moments; the target's may be longer. What one
says the other hears in its next pass. A copy between a device and the slot takes what its bytes
take on the link, after all copies before it, and is known to be complete in the pass after; the
target's begins when the step in flight has ended, which may still write there.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from pascal_sglang.cluster.messages import Handover, KVChunk, ReserveGranted, ReserveRequest
from pascal_sglang.cluster.migration_pace import (
    GROWTH,
    PASSES,
    PIECE_TOKENS,
    WAITED_SHARE,
    MigrationPace,
)
from pascal_sglang.cluster.migration_source import MigrationSource, SourceState, Terms
from pascal_sglang.cluster.migration_target import MigrationTarget, TargetState

STEP_S = 0.025
TOKEN_BYTES = 256 << 10
WINDOW_TOKENS = (64 << 20) // TOKEN_BYTES
PCIE = 20e9


@dataclass(kw_only=True, slots=True, eq=False)
class Source(MigrationSource):
    world: Any

    def stop(self):
        self.world.stopped_at = self.world.now

    def learn(self):
        self.world.pace.copied(self.passes, self.pieces)

    def snapshot(self):
        return b""

    def nothing(self):
        pass

    resume = release = lose = nothing


@dataclass(kw_only=True, slots=True, eq=False)
class Target(MigrationTarget):
    world: Any

    def fetch(self, begin, end, before, *, stopped):
        step_s = STEP_S * self.world.slower
        done = self.world.reader.copy(end - begin, self.world.now + step_s)
        if not stopped:
            self.world.reads.append(done)
        return True

    def has_read(self):
        if self.world.reads[0] >= self.world.now:
            return None
        self.world.reads.pop(0)
        return True

    def problem(self, state, tokens):
        return None

    def take(self, state, tokens):
        self.world.taken_at = self.world.now
        return True

    def nothing(self):
        pass

    drop = revoke = nothing


def pace_of(step_tokens=1, bytes_s=PCIE, **more):
    """What is known of a link of that speed after some passes."""
    token_s = TOKEN_BYTES / bytes_s
    return MigrationPace(WINDOW_TOKENS, step_tokens, token_s, pass_s=STEP_S, **more)


class Link:
    """A copy stream; `bytes_s` is its speed."""

    def __init__(self, bytes_s):
        self.bytes_s, self.free_at = bytes_s, 0.0

    def copy(self, tokens, now):
        """When it is complete."""
        self.free_at = max(now, self.free_at) + tokens * TOKEN_BYTES / self.bytes_s
        return self.free_at


class World:
    """A move of a request with `tokens` of KV, which gains `step_tokens` in each step."""

    def __init__(self, tokens, *, apart=0.5, bytes_s=PCIE, pace=None, slower=1, tail=16):
        """apart: how much later than the source's the target's passes begin, in passes. slower: how
        many of the source's a pass of the target's takes."""
        if pace is None:
            pace = pace_of(bytes_s=bytes_s)
        self.pace, self.now, self.kv, self.slower = pace, 0.0, tokens, slower
        self.apart, self.writer, self.reader = apart, Link(bytes_s), Link(bytes_s)
        self.reads, self.written_at = [], 0.0
        self.stopped_at = self.still_at = self.taken_at = None
        reserve = tokens + 1 + pace.growth(tokens, 1) + pace.spare
        terms = Terms(tail=tail)
        self.source = Source(
            migration="m", rid="r", terms=terms, reserve=reserve, spare=pace.spare, world=self
        )
        self.target = Target(migration="m", rid="r", terms=terms, tokens=reserve, world=self)
        self.to_target, self.to_source = self.source.begin(0.0, "layout"), []

    def run(self):
        for number in range(20_000):
            self.now = number * STEP_S
            self.source_pass()
            self.now += self.apart * STEP_S
            if number % self.slower == 0:
                self.target_pass()
            if self.taken_at is not None or self.source.state is SourceState.KEPT:
                return self
        raise AssertionError("it never ends")

    def source_pass(self):
        for message in self.to_source:
            self.to_target += self.source.hear(message, self.now)
        self.to_source = []
        runs = self.stopped_at is None
        # The step in flight when it stops still gives it tokens.
        if self.still_at is None:
            self.kv += self.pace.step_tokens
            self.still_at = None if runs else self.now
        if self.written_at < self.now:
            self.to_target += self.source.written(self.now)
        self.source.link_tokens = self.pace.link_tokens(1)
        still = self.still_at is not None
        for message in self.source.copy(self.kv, still=still):
            if isinstance(message, KVChunk):
                self.written_at = self.writer.copy(message.end - message.begin, self.now)
            elif isinstance(message, Handover):
                # The scheduler waits for that: it is little.
                tokens = message.kv_tokens - message.begin
                self.now = max(self.now, self.writer.copy(tokens, self.now))
                self.to_target += self.source.written(self.now)
            else:
                self.to_target.append(message)
        self.to_target += self.source.tick(self.now)

    def target_pass(self):
        said = []
        for message in self.to_target:
            if isinstance(message, ReserveRequest):
                self.target.heard = self.now
                said.append(ReserveGranted("m", ["here"], 0, WINDOW_TOKENS))
            else:
                said += self.target.hear(message, self.now)
        self.to_target = []
        self.to_source += said + self.target.tick(self.now)

    @property
    def blocked_passes(self):
        return (self.taken_at - self.stopped_at) / STEP_S


@pytest.mark.parametrize("apart", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("tokens", [1000, 2000, 3000, 5000, 8000])
def test_a_request_of_a_large_model_moves_in_about_a_second_and_its_reader_waits_three_steps(
    tokens, apart
):
    world = World(tokens, apart=apart).run()
    assert world.target.state is TargetState.OWNED
    assert world.blocked_passes <= 3
    assert world.taken_at <= 1.2 * math.ceil(tokens / 3000)


@pytest.mark.parametrize("step_tokens", [1, 4, 8])
@pytest.mark.parametrize("bytes_s", [1e9, 4e9, 50e9])
def test_a_reader_waits_no_longer_on_a_slow_link_or_with_drafts(step_tokens, bytes_s):
    pace = pace_of(step_tokens, bytes_s)
    for _ in range(5):
        world = World(3000, bytes_s=bytes_s, pace=pace).run()
        assert world.target.state is TargetState.OWNED
        assert world.blocked_passes <= 3
        assert world.source.sent <= 3000 + pace.growth(3000, 1)


@pytest.mark.parametrize("slower", [4, 8, 16])
@pytest.mark.parametrize(("step_tokens", "tail"), [(1, 16), (3, 32)])
@pytest.mark.parametrize("tokens", [100, 1000, 3000, 8000])
def test_a_request_moves_to_an_instance_with_longer_passes(tokens, step_tokens, tail, slower):
    """As off an instance that is drained and has little left to do, to one with a large batch. It
    stays only while moves before have not shown how long they take, and if much is left."""
    pace = pace_of(step_tokens)
    kept = 0
    for _ in range(20):
        world = World(tokens, pace=pace, slower=slower, tail=tail).run()
        if world.source.state is SourceState.KEPT:
            kept += 1
            assert world.source.why == "outgrew its reservation"
            assert world.kv - world.source.sent > WINDOW_TOKENS
            assert world.stopped_at is None, "its reader never waits"
        else:
            assert world.target.state is TargetState.OWNED
            assert world.blocked_passes <= 4 * slower + 5, "the pieces in flight, and the last one"
    assert kept <= 10
    assert world.target.state is TargetState.OWNED


@pytest.mark.parametrize("slower", [4, 8, 16])
@pytest.mark.parametrize(("step_tokens", "tail"), [(1, 16), (3, 32)])
def test_a_request_stops_when_little_is_left_though_the_target_takes_long_passes(
    step_tokens, tail, slower
):
    """As many tokens as it gains until the target has read a piece are little."""
    pace = MigrationPace(
        WINDOW_TOKENS, step_tokens, TOKEN_BYTES / PCIE, passes_per_piece=3 * slower
    )
    world = World(1000, pace=pace, slower=slower, tail=tail).run()
    assert world.target.state is TargetState.OWNED
    assert world.blocked_passes <= slower + 3, "a pass of the target's"
    assert world.kv < world.source.reserve - 2 * pace.spare, "before its reservation is full"


def test_moves_that_outgrow_their_reservation_teach_how_long_they_take():
    pace = pace_of(3)
    before = pace.growth(8000, 1)
    world = World(8000, pace=pace, slower=16).run()
    assert world.source.state is SourceState.KEPT
    assert pace.growth(8000, 1) > 1.2 * before


def test_a_request_that_a_link_cannot_follow_stays_and_its_reader_never_waits():
    """Half a token a step, where it gains one."""
    world = World(3000, bytes_s=TOKEN_BYTES / STEP_S / 2).run()
    assert (world.source.why, world.stopped_at) == ("outgrew its reservation", None)


def test_passes_and_growth_follow_what_moves_took():
    pace = MigrationPace(100, step_tokens=2)
    before = pace.passes(1000, 1)
    assert pace.growth(1000, 1) == GROWTH + 2 * before * 2
    for _ in range(100):
        pace.copied(60, 10)
    assert pace.passes(1000, 1) - before == pytest.approx(40, abs=1)
    pace.copied(5, 0)
    assert pace.passes_per_piece == pytest.approx(6, abs=0.1), "nothing went: nothing is learned"


def test_a_link_is_measured_by_pieces_that_were_waited_for():
    pace = MigrationPace(512, pass_s=STEP_S)
    assert pace.link_tokens(1) is None
    pace.went(15, 1.0)
    assert pace.link_tokens(1) is None, "too short to say anything"
    pace.went(400, 10_000.0)
    assert pace.link_tokens(1) == 250
    passes = pace.passes(1000, 1)
    for _ in range(50):
        pace.went(400, 4_000.0)
    assert pace.link_tokens(1) == pytest.approx(100, abs=1)
    assert pace.passes(1000, 1) >= 2 * passes
    pace.went(400, 0.0)
    assert pace.link_tokens(1) == pytest.approx(100, abs=1), "that piece did not go"
    pace = MigrationPace(512, token_s=1e-4)
    assert pace.link_tokens(1) is None, "no pass has been seen"
    pace.passed(STEP_S)
    assert pace.link_tokens(1) == 250


def test_handovers_which_wait_for_more_than_the_link_do_not_make_it_slow():
    pace = MigrationPace(512, token_s=1e-4, pass_s=STEP_S)
    for _ in range(50):
        pace.went(40, 40 / 0.02, stopped=True)
    assert pace.link_tokens(1) == 250
    pace.went(500, 5_000.0, stopped=True)
    assert 125 < pace.link_tokens(1) < 250, "a long one says something, beside what was measured"


def test_pieces_that_are_waited_for_do_not_grow_by_the_passes_that_they_lengthen():
    pace = MigrationPace(4096, token_s=1e-4, pass_s=STEP_S, share=WAITED_SHARE)
    for _ in range(100):
        tokens = pace.link_tokens(1)
        pace.went(tokens, 10_000.0)
        pace.passed(STEP_S + tokens / 10_000.0)
    assert pace.pass_s == pytest.approx(STEP_S)
    assert pace.link_tokens(1) == int(WAITED_SHARE * 250)
    pace.went(1000, 10_000.0)
    pace.passed(None)
    pace.passed(STEP_S)
    assert pace.pass_s == pytest.approx(STEP_S), "the wait was of a pass that says nothing"


def test_moves_share_what_the_link_carries_in_a_pass():
    pace = MigrationPace(4096, token_s=1e-4, pass_s=STEP_S)
    assert [pace.link_tokens(moves) for moves in (0, 1, 2, 5)] == [250, 250, 125, 50]
    assert pace.passes(1000, 2) > pace.passes(1000, 1)


def test_the_length_of_a_move_is_that_of_the_pieces_that_go():
    """However slow the link is, a piece has some tokens."""
    pace = pace_of(bytes_s=TOKEN_BYTES / STEP_S)
    assert pace.link_tokens(1) == PIECE_TOKENS
    assert pace.passes(160, 1) == PASSES + 10 * pace.passes_per_piece
    assert World(1000, pace=pace).run().source.piece_tokens == PIECE_TOKENS
