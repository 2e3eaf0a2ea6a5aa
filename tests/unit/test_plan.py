"""Promises of the plan, for every policy, under random situations."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import (
    BACKFILL_DEPTH,
    GROWTH,
    MOST_STARTS,
    PATIENCE,
    Capacity,
    KVAccounting,
    Plan,
    Planner,
)
from pascal_sglang.policy.ranking import (
    AHEAD,
    OVERDUE,
    REACTION_PASSES,
    THINKING,
    URGENT,
    PassInfo,
    Tuning,
    is_demoted,
)
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import Reader, RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase

HEADROOM = 20
TUNING = Tuning(
    quantum=50, demote=400, ageing=8, stall_s=0.01, burst=100, settle=200, headroom=HEADROOM
)
NOW = 1000.0
TPOT = 0.1


@st.composite
def request(draw, seq, status):
    pacer = Pacer(TPOT)
    answering = status is not RequestStatus.WAITING and draw(st.booleans())
    tokens = draw(st.integers(0, 600))
    if answering and tokens:
        pacer.delivered = tokens
        pacer.first_shown = NOW - 50
        pacer.last_shown = NOW + draw(st.floats(-2, 5))
    return RequestState(
        seq=seq,
        pacer=pacer,
        status=status,
        phase=Phase.ANSWERING if answering else Phase.REASONING,
        reader=draw(st.sampled_from([Reader.HUMAN, Reader.HUMAN, Reader.PROGRAM])),
        phase_tokens=tokens,
        total_tokens=tokens + (draw(st.integers(0, 300)) if answering else 0),
        kv_tokens=draw(st.integers(1, 700)),
        pausable=draw(st.sampled_from([True, True, True, False])),
        since_pass=draw(st.integers(0, 5000)),
    )


@st.composite
def situation(draw):
    places = draw(st.lists(st.sampled_from(list(RequestStatus)), max_size=14))
    requests = [draw(request(i, status)) for i, status in enumerate(places)]
    capacity = Capacity(
        draw(st.integers(0, 1500)), draw(st.integers(0, 300)), draw(st.integers(0, 6))
    )
    running = [m for m in requests if m.status is RequestStatus.RUNNING]
    return running, [m for m in requests if m.status is not RequestStatus.RUNNING], capacity


MOMENT = PassInfo(5000, NOW, 0.01)
SCHEDULING = sorted(name for name, policy in POLICIES.items() if policy.schedules)
policies = st.sampled_from(SCHEDULING)


def planner_with(policy, others):
    planner = Planner(POLICIES[policy], TUNING)
    planner.queue.recount(others)
    return planner


def decide(policy, running, others, capacity):
    planner = planner_with(policy, others)
    return planner, planner.plan(running, capacity, MOMENT)


@given(policies, situation())
@settings(max_examples=200, deadline=None)
def test_never_beyond_memory_or_slots(policy, case):
    running, others, capacity = case
    _, plan = decide(policy, running, others, capacity)
    if not running and len(plan.start) == 1:
        return  # An idle instance may try what does not fit; the engine refuses it.
    given_back = sum(m.kv_tokens for m in plan.pause if m not in plan.park)
    given_back += sum(m.kv_tokens for m in plan.spill)
    left = capacity.free_tokens + capacity.releasing_tokens + given_back
    growing = len(running) - len(plan.pause) + len(plan.start)
    if plan.start:
        assert sum(map(needs, plan.start)) + GROWTH * growing <= left
        assert len(plan.start) <= max(0, capacity.slots) + len(plan.pause)


def needs(m):
    return 0 if m.status is RequestStatus.RESIDENT else m.kv_tokens


# Of a model with recurrent states: a prefill takes three, a request from host memory one.
STATES = KVAccounting(
    states_required=lambda m: {RequestStatus.WAITING: 3, RequestStatus.HOST: 1}.get(m.status, 0),
    states_reclaimable=lambda m: m.status in (RequestStatus.RUNNING, RequestStatus.RESIDENT),
)


@given(policies, situation(), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_never_beyond_recurrent_states(policy, case, states):
    running, others, capacity = case
    planner = Planner(POLICIES[policy], TUNING, STATES)
    planner.queue.recount(others)
    plan = planner.plan(running, dataclasses.replace(capacity, states=states), MOMENT)
    if not running and len(plan.start) == 1:
        return
    gone = [m for m in plan.pause if m not in plan.park] + list(plan.spill)
    left = states + len(gone) - sum(map(STATES.states_required, plan.start))
    assert left >= 0
    assert plan.start or not gone or capacity.free_tokens < GROWTH * len(running)


def test_a_state_on_the_device_gives_way_to_one_that_starts():
    """Memory and slots suffice; of three states that a prefill takes two are free."""
    pacer = Pacer(TPOT, delivered=50, last_shown=NOW + 9)
    answer = RequestState(0, pacer, RequestStatus.RESIDENT, Phase.ANSWERING, 50, 100, kv_tokens=100)
    thinker = RequestState(1, Pacer(TPOT), kv_tokens=30)
    runs = RequestState(2, Pacer(TPOT), RequestStatus.RUNNING, kv_tokens=30)
    planner = Planner(POLICIES["pascal"], TUNING, STATES)
    planner.queue.recount([answer, thinker])
    plan = planner.plan([runs], Capacity(500, 0, 4, states=2), MOMENT)
    assert plan.spill == (answer,)
    assert plan.start == (thinker,)
    blocked = planner.plan([runs], Capacity(500, 0, 4, states=0), MOMENT)
    assert (blocked.start, blocked.spill, blocked.shortage) == ((), (), "states")


def test_an_idle_instance_gives_all_it_has_to_the_first_in_line():
    """What two residents share is counted for neither, and is free once both have given way."""
    pacer = Pacer(TPOT, delivered=50, last_shown=NOW + 9)
    residents = [
        RequestState(i, pacer, RequestStatus.RESIDENT, Phase.ANSWERING, 50, 100, kv_tokens=100)
        for i in range(2)
    ]
    thinker = RequestState(2, Pacer(TPOT), kv_tokens=300)
    planner = Planner(POLICIES["pascal"], TUNING, KVAccounting(reclaimable=lambda _: 100))
    planner.queue.recount([*residents, thinker])
    plan = planner.plan([], Capacity(50, 0, 4), MOMENT)
    assert plan.start == (thinker,)
    assert set(plan.spill) == set(residents)


@pytest.mark.parametrize(("free", "starts"), [(5000, [2]), (8, [])])
def test_without_a_place_for_its_adapter_a_request_displaces_nobody(free, starts):
    """Its own reason is given, whatever else it lacks; what fits behind it starts."""
    ahead = Pacer(TPOT, delivered=50, last_shown=NOW + 99)
    runs = RequestState(0, ahead, RequestStatus.RUNNING, Phase.ANSWERING, 50, 100, kv_tokens=90)
    waits, behind = (
        RequestState(seq, Pacer(TPOT), kv_tokens=30, since_pass=MOMENT.pass_no) for seq in (1, 2)
    )
    planner = Planner(
        POLICIES["pascal"], TUNING, KVAccounting(adapter_fits=lambda m: m is not waits)
    )
    planner.queue.recount([waits, behind])
    plan = planner.plan([runs], Capacity(free, 0, 4), MOMENT)
    assert (plan.blocked, plan.shortage, plan.pause) == (waits, "adapters", ())
    assert [m.seq for m in plan.start] == starts
    planner.accounting = KVAccounting()
    assert planner.plan([runs], Capacity(5000, 0, 4), MOMENT).start == (waits, behind)


# Of a model with sliding windows of ten tokens.
WINDOWS = KVAccounting(
    windows_required=lambda m: 0 if m.status is RequestStatus.RESIDENT else min(m.kv_tokens, 10),
    windows_reclaimable=lambda m: min(m.kv_tokens, 10),
)


@given(policies, situation(), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_never_beyond_sliding_windows(policy, case, windows):
    running, others, capacity = case
    planner = Planner(POLICIES[policy], TUNING, WINDOWS)
    planner.queue.recount(others)
    plan = planner.plan(running, dataclasses.replace(capacity, windows=windows), MOMENT)
    if not plan.start or (not running and len(plan.start) == 1):
        return
    gone = [m for m in plan.pause if m not in plan.park] + list(plan.spill)
    left = windows + sum(map(WINDOWS.windows_reclaimable, gone))
    growing = len(running) - len(plan.pause)
    assert sum(map(WINDOWS.windows_required, plan.start)) + GROWTH * growing <= left


def test_windows_that_grow_take_from_the_worst():
    """There is KV enough, but not for the windows of two who decode."""
    best, worst = (
        RequestState(i, Pacer(TPOT), RequestStatus.RUNNING, total_tokens=tokens, kv_tokens=30)
        for i, tokens in enumerate((5, 500))
    )
    planner = Planner(POLICIES["pascal"], TUNING, WINDOWS)
    plan = planner.plan([best, worst], Capacity(500, 0, 4, windows=7), MOMENT)
    assert (plan.pause, plan.park) == ((worst,), frozenset({worst}))
    starts = RequestState(2, Pacer(TPOT), kv_tokens=30)
    planner = Planner(POLICIES["pascal"], TUNING, WINDOWS)
    planner.queue.recount([starts])
    best.pausable = False
    blocked = planner.plan([best], Capacity(500, 0, 4, windows=9), MOMENT)
    assert (blocked.start, blocked.shortage) == ((), "windows")


@given(policies, situation())
@settings(max_examples=200, deadline=None)
def test_kv_leaves_the_device_only_for_memory(policy, case):
    """Nobody's KV is copied away while what is free covers all that starts and grows."""
    running, others, capacity = case
    _, plan = decide(policy, running, others, capacity)
    assert all(m.status is RequestStatus.RESIDENT and m not in plan.start for m in plan.spill)
    assert plan.park <= set(plan.pause)
    if not running and len(plan.start) == 1:
        return
    left = capacity.free_tokens + capacity.releasing_tokens
    left -= sum(needs(m) + HEADROOM for m in plan.start)
    left -= GROWTH * (len(running) - len(plan.pause))
    gone = [m for m in plan.pause if m not in plan.park] + list(plan.spill)
    left += sum(m.kv_tokens for m in gone)
    assert all(m.kv_tokens > left for m in gone), "one of them could have kept its KV"


def test_a_pause_for_a_slot_leaves_the_kv_where_it_is():
    """Two slots' worth of memory, one slot: the thinker gets the answer's slot, not its memory."""
    pacer = Pacer(TPOT, delivered=50, last_shown=NOW + 9)
    answer = RequestState(0, pacer, RequestStatus.RUNNING, Phase.ANSWERING, 50, 100, kv_tokens=100)
    thinker = RequestState(1, Pacer(TPOT), kv_tokens=30)
    planner, plan = decide("pascal", [answer], [thinker], Capacity(500, 0, 0))
    assert plan == Plan(start=(thinker,), pause=(answer,), park=frozenset({answer}))
    planner.queue.stopped(answer, RequestStatus.RESIDENT, MOMENT)
    planner.queue.started(thinker, MOMENT)
    tight = planner.plan([thinker], Capacity(2, 0, 0), MOMENT)
    assert tight.spill == (answer,), "who does not run gives up its KV first"
    assert not tight.pause


@given(policies, situation())
@settings(max_examples=200, deadline=None)
def test_nobody_is_paused_for_nothing(policy, case):
    running, others, capacity = case
    _, plan = decide(policy, running, others, capacity)
    short = capacity.free_tokens + capacity.releasing_tokens < GROWTH * len(running)
    assert plan.start or short or not (plan.pause or plan.spill)
    assert all(m.pausable and m.status is RequestStatus.RUNNING for m in plan.pause)
    assert len(set(map(id, plan.pause))) == len(plan.pause)


@given(policies, situation())
@settings(max_examples=200, deadline=None)
def test_at_the_level_order_no_plan_pauses(policy, case):
    """None can be paused there, so that none is paused, and SGLang says what fits."""
    running, others, capacity = case
    waiting = [m for m in others if m.status is RequestStatus.WAITING]
    for m in (*running, *waiting):
        m.pausable = m.keeps_kv = False
    capacity = dataclasses.replace(capacity, free_tokens=1 << 60)
    planner = planner_with(policy, waiting)
    planner.accounting = KVAccounting(required=lambda _: 0)
    plan = planner.plan(running, capacity, MOMENT)
    assert (plan.pause, plan.park, plan.spill) == ((), frozenset(), ())
    best = sorted(waiting, key=place_in(planner))
    starts = min(len(best), max(capacity.slots, 0)) or (1 if best and not running else 0)
    assert list(plan.start) == best[:starts]


@given(policies, situation())
@settings(max_examples=200, deadline=None)
def test_at_the_level_recompute_no_kv_is_kept(policy, case):
    running, others, capacity = case
    waiting = [m for m in others if m.status is RequestStatus.WAITING]
    for m in (*running, *waiting):
        m.keeps_kv = False
    _, plan = decide(policy, running, waiting, capacity)
    assert (plan.park, plan.spill) == (frozenset(), ())


@given(policies, situation())
@settings(max_examples=200, deadline=None)
def test_only_a_strictly_better_rank_displaces(policy, case):
    running, others, capacity = case
    short = capacity.free_tokens + capacity.releasing_tokens < GROWTH * len(running)
    planner, plan = decide(policy, running, others, capacity)
    if plan.start and not short:

        def rank(m):
            return planner.policy.rank(m, MOMENT, TUNING)

        assert all(rank(v) > min(map(rank, plan.start)) for v in plan.pause)


@given(policies, situation())
@settings(max_examples=200, deadline=None)
def test_the_same_view_gives_the_same_plan(policy, case):
    running, others, capacity = case
    planner, first = decide(policy, running, others, capacity)
    planner.queue.recount([])
    _, again = decide(policy, list(reversed(running)), list(reversed(others)), capacity)
    assert first == again


@given(policies, situation())
@settings(max_examples=200, deadline=None)
def test_the_line_is_in_the_order_of_the_one_key(policy, case):
    _, others, _ = case
    planner = planner_with(policy, others)
    assert list(planner.queue.best_first(MOMENT)) == sorted(others, key=place_in(planner))
    assert len(planner.queue) == len(others)
    for m in others[::2]:
        planner.queue.remove(m)
        planner.queue.remove(m)
    for m in others[:1]:
        planner.queue.add(m)
    left = [m for m in others if m in others[:1] or m not in others[::2]]
    assert list(planner.queue.best_first(MOMENT)) == sorted(left, key=place_in(planner))
    assert len(planner.queue) == len(left)


def place_in(planner):
    policy = planner.policy
    return lambda m: (policy.rank(m, MOMENT, TUNING), policy.key(m, TUNING), m.seq)


@given(situation())
@settings(max_examples=200, deadline=None)
def test_no_thinker_waits_behind_an_answer_with_slack(case):
    """Under `pascal`, the first thinker in line starts if pausing answers with slack makes room."""
    running, others, capacity = case
    planner, plan = decide("pascal", running, others, capacity)
    ranks = {m.seq: planner.policy.rank(m, MOMENT, TUNING) for m in [*running, *others]}
    queue = sorted(others, key=place_in(planner))
    if not queue or ranks[queue[0].seq][0] in (URGENT, AHEAD):
        return
    first = queue[0]
    slack = [m for m in running if m.pausable and ranks[m.seq][0] == AHEAD]
    room_made = capacity.free_tokens + capacity.releasing_tokens - GROWTH * len(running)
    room_made += sum(m.kv_tokens + GROWTH for m in slack)
    if needs(first) + HEADROOM <= room_made and capacity.slots + len(slack) >= 1:
        assert first in plan.start


@given(situation())
@settings(max_examples=200, deadline=None)
def test_an_answer_about_to_run_dry_comes_back_if_any_order_allows(case):
    running, others, capacity = case
    planner, plan = decide("pascal", running, others, capacity)

    def urgent(m):
        return planner.policy.rank(m, MOMENT, TUNING)[0] == URGENT

    dry = sorted((m for m in others if urgent(m)), key=place_in(planner))
    ranks = [planner.policy.rank(m, MOMENT, TUNING)[0] for m in others]
    if not dry or OVERDUE in ranks:
        return
    yielding = [m for m in running if m.pausable and not urgent(m)]
    most = capacity.free_tokens + capacity.releasing_tokens - GROWTH * len(running)
    most += sum(m.kv_tokens + GROWTH for m in yielding)
    if needs(dry[0]) + HEADROOM <= most and capacity.slots + len(yielding) >= 1:
        assert dry[0] in plan.start


def test_an_answer_that_came_back_settles_before_thinking_displaces_it():
    """Its lead grows to `settle` stalls first; one about to run dry does not wait for that."""
    pacer = Pacer(TPOT, delivered=5, last_shown=NOW + 1.5)  # More than a burst, less than settled.
    back = RequestState(0, pacer, RequestStatus.RUNNING, Phase.ANSWERING, 5, 50, kv_tokens=90)
    since = MOMENT.pass_no
    thinker, later = (
        RequestState(seq, Pacer(TPOT), kv_tokens=50, since_pass=since) for seq in (1, 2)
    )
    dry_pacer = Pacer(TPOT, delivered=5, last_shown=NOW)
    dry = RequestState(3, dry_pacer, RequestStatus.HOST, Phase.ANSWERING, 5, 50, kv_tokens=50)
    blocked = planner_with("pascal", [thinker]).plan([back], Capacity(10, 0, 4), MOMENT)
    assert blocked == Plan(blocked=thinker, shortage="rank")
    hurried = planner_with("pascal", [dry]).plan([back], Capacity(10, 0, 4), MOMENT)
    assert (hurried.pause, hurried.start) == ((back,), (dry,))
    pacer.last_shown = NOW + 2.5
    settled = planner_with("pascal", [later]).plan([back], Capacity(10, 0, 4), MOMENT)
    assert (settled.pause, settled.start) == ((back,), (later,))


@pytest.mark.parametrize("policy", SCHEDULING)
def test_no_ping_pong_within_a_quantum(policy):
    """Two thinkers, room for one: the one that runs keeps running for a quantum."""
    planner = Planner(POLICIES[policy], TUNING)
    requests = [RequestState(seq=i, pacer=Pacer(TPOT), kv_tokens=20) for i in range(2)]
    for m in requests:
        planner.queue.add(m)
    switches, running = 0, None
    for pass_no in range(1, 2000):
        pass_info = PassInfo(pass_no, NOW + pass_no * 0.01, 0.01)
        free = 50 - (running.kv_tokens if running else 0)
        plan = planner.plan([running] if running else [], Capacity(free, 0, 2), pass_info)
        if plan.pause:
            planner.queue.stopped(running, RequestStatus.HOST, pass_info)
            running = None
        if plan.start:
            running = plan.start[0]
            planner.queue.started(running, pass_info)
            switches += 1
        running.phase_tokens += 1
        running.total_tokens += 1
    assert 2 <= switches <= 2000 / TUNING.quantum + 2


def test_displacement_finds_todays_victim_behind_an_old_ranking():
    """Victims are ranked for many passes; an answer that has gained slack since is found."""
    pacer = Pacer(TPOT, delivered=5, last_shown=NOW)
    answer = RequestState(0, pacer, RequestStatus.RUNNING, Phase.ANSWERING, 5, 50, kv_tokens=90)
    thinker = RequestState(1, Pacer(TPOT), RequestStatus.RUNNING, kv_tokens=90)
    fresh = RequestState(2, Pacer(TPOT), kv_tokens=50, since_pass=MOMENT.pass_no)
    planner = planner_with("pascal", [fresh])
    first = planner.plan([answer, thinker], Capacity(10, 0, 4), MOMENT)
    assert first == Plan(blocked=fresh, shortage="rank")
    soon = PassInfo(MOMENT.pass_no + 1, NOW, 0.01)
    again = planner.plan([answer, thinker], Capacity(10, 0, 4), soon)
    assert again == first, "what it lacks is known while it is not tried again"
    pacer.last_shown = NOW + 9
    later = PassInfo(MOMENT.pass_no + PATIENCE, NOW, 0.01)
    assert planner.plan([answer, thinker], Capacity(10, 0, 4), later).pause == (answer,)


def test_a_prefix_on_the_device_counts_as_having_waited():
    """Arrived in the same pass: the one that needs less goes first; a quantum outweighs it."""
    cold = RequestState(0, Pacer(TPOT), kv_tokens=50, since_pass=4990)
    warm = RequestState(1, Pacer(TPOT), kv_tokens=50, since_pass=4995, head_start=10)
    assert list(planner_with("pascal", [cold, warm]).queue.best_first(MOMENT)) == [warm, cold]
    warm.phase_tokens = TUNING.quantum
    assert list(planner_with("pascal", [cold, warm]).queue.best_first(MOMENT)) == [cold, warm]


@pytest.mark.parametrize(("on", "demoted"), [("kv", True), ("thinking", False)])
def test_what_counts_towards_demotion(on, demoted):
    late = RequestState(0, Pacer(TPOT), phase_tokens=100, total_tokens=500)
    assert is_demoted(late, Tuning(demote=400, demote_on=on)) is demoted


STRIDE = 8  # Passes between two plans, in which every running request gets a token each.


@given(
    tokens=st.sampled_from([0, 120, 399, 401, 1000]),
    length=st.integers(5, 120),
    clients=st.integers(1, 4),
    answers=st.booleans(),
    status=st.sampled_from([RequestStatus.WAITING, RequestStatus.HOST]),
)
@settings(max_examples=25, deadline=None)
def test_waiting_is_bounded_under_endless_streams(tokens, length, clients, answers, status):
    """A thinker, room for one request, and always new short ones and urgent answers in line.

    1,000 tokens here are twenty quanta, as 10,000 are by default.
    """
    planner = Planner(POLICIES["pascal"], TUNING)
    thinker = RequestState(
        0, Pacer(TPOT), status, phase_tokens=tokens, total_tokens=tokens, kv_tokens=20
    )
    consumed = tokens // TUNING.quantum + (TUNING.demotion if tokens > TUNING.demote else 0)
    bound = TUNING.ageing * TUNING.quantum * (consumed + TUNING.overdue)
    # Those that have come first, and the time in which the planner tries again.
    bound += (clients + 1) * (length + STRIDE) + PATIENCE + STRIDE
    planner.queue.add(thinker)
    fresh: list[RequestState] = []
    running: list[RequestState] = []
    seq = itertools.count(1)
    for pass_no in range(1, bound + 2, STRIDE):
        pass_info = PassInfo(pass_no, NOW, 0.01)
        while sum(planner.queue.holds(m) for m in fresh) < clients:
            fresh.append(RequestState(next(seq), Pacer(TPOT), kv_tokens=20))
            planner.queue.stopped(fresh[-1], RequestStatus.WAITING, pass_info)
        if answers:
            dry = Pacer(TPOT, delivered=5, last_shown=NOW)
            answer = RequestState(
                next(seq), dry, phase=Phase.ANSWERING, phase_tokens=5, kv_tokens=20
            )
            planner.queue.stopped(answer, RequestStatus.HOST, pass_info)
        free = 50 - sum(m.kv_tokens for m in running)
        plan = planner.plan(running, Capacity(free, 0, 4), pass_info)
        if thinker in plan.start:
            return
        for m in plan.pause:
            planner.queue.stopped(m, RequestStatus.HOST, pass_info)
        running = [m for m in running if m not in plan.pause] + list(plan.start)
        for m in plan.start:
            planner.queue.started(m, pass_info)
        for m in running:
            m.total_tokens += STRIDE
            m.phase_tokens += STRIDE
        running = [m for m in running if m.total_tokens < length]
        fresh = [m for m in fresh if planner.queue.holds(m)]
        if answers:
            planner.queue.remove(answer)
    pytest.fail(f"starved for more than {bound} passes")


def test_demotion_is_an_offset_that_waiting_makes_up_for():
    """`demotion` quanta behind; `paper` keeps its low class, which nothing leaves."""
    tuning = dataclasses.replace(TUNING, demote_on="thinking")
    demoted, thinker = (
        RequestState(seq, Pacer(TPOT), phase_tokens=count, total_tokens=count, kv_tokens=20)
        for seq, count in enumerate((450, 350))
    )
    since = MOMENT.pass_no
    for waited, first in (
        (0, thinker),
        (1 + TUNING.demotion, thinker),
        (3 + TUNING.demotion, demoted),
    ):
        demoted.since_pass = since - waited * tuning.ageing * tuning.quantum
        thinker.since_pass = since
        for policy, expected in (("pascal", first), ("paper", thinker)):
            planner = Planner(POLICIES[policy], tuning)
            planner.queue.recount([demoted, thinker])
            assert next(planner.queue.best_first(MOMENT)) is expected


BACKFILLING = sorted(name for name in SCHEDULING if POLICIES[name].backfills)


@given(st.sampled_from(BACKFILLING), situation())
@settings(max_examples=300, deadline=None)
def test_backfill_takes_only_memory_that_nobody_ahead_can_use(policy, case):
    """Who starts behind a blocked request has a quantum of room, and nobody gives way for it."""
    running, others, capacity = case
    planner, plan = decide(policy, running, others, capacity)
    if plan.blocked is None or plan.blocked in plan.start:
        return
    place = place_in(planner)
    behind = [m for m in plan.start if place(m) > place(plan.blocked)]
    if not behind:
        return
    assert not plan.pause
    assert not plan.spill
    assert MOMENT.pass_no - plan.blocked.since_pass < TUNING.backfill * TUNING.quantum
    before = [m for m in plan.start if m not in behind]
    left = capacity.free_tokens + capacity.releasing_tokens - GROWTH * len(running)
    left -= sum(needs(m) + HEADROOM for m in before)
    assert sum(needs(m) + TUNING.quantum for m in behind) <= left
    assert len(plan.start) <= capacity.slots


def test_the_first_in_line_waits_no_longer_for_backfill_than_its_bound():
    """A big prompt, room for it only in an empty instance, and always a small one behind it."""
    tuning = dataclasses.replace(TUNING, ageing=100)  # Ageing does not help it before.
    planner = Planner(POLICIES["pascal"], tuning)
    big = RequestState(0, Pacer(TPOT), RequestStatus.WAITING, kv_tokens=900)
    planner.queue.add(big)
    bound, overtaken = TUNING.backfill * TUNING.quantum, 0
    running = [RequestState(10**6, Pacer(TPOT), RequestStatus.RUNNING, kv_tokens=80)]
    for pass_no in range(1, bound + TUNING.quantum):
        pass_info = PassInfo(pass_no, NOW, 0.01)
        small = RequestState(pass_no, Pacer(TPOT), kv_tokens=20, since_pass=pass_no)
        planner.queue.add(small)
        free = 1000 - sum(m.kv_tokens + m.total_tokens for m in running)
        plan = planner.plan(running, Capacity(free, 0, 9), pass_info)
        if big in plan.start:
            assert pass_no >= bound, "until then the small ones use the memory"
            assert overtaken > bound / TUNING.quantum
            return
        for m in plan.start:
            planner.queue.started(m, pass_info)
            running.append(m)
            overtaken += 1
        planner.queue.remove(small)
        for m in running:
            m.total_tokens += 1
            m.phase_tokens += 1
        running = [m for m in running if m.total_tokens < TUNING.quantum - 1]
    pytest.fail(f"the first in line waited for more than {bound + TUNING.quantum} passes")


def test_a_pass_that_cannot_find_anybody_new_does_not_look():
    asked: list[int] = []

    def required(m):
        asked.append(m.seq)
        return needs(m)

    planner = Planner(POLICIES["pascal"], TUNING, KVAccounting(required=required))
    queue = [RequestState(i, Pacer(TPOT), kv_tokens=kv) for i, kv in enumerate((900, 300, 400))]
    for m in queue:
        planner.queue.stopped(m, RequestStatus.WAITING, PassInfo(1, NOW, 0.01))
    running = [RequestState(9, Pacer(TPOT), RequestStatus.RUNNING, kv_tokens=500)]

    def looked_at(pass_no, free):
        asked.clear()
        plan = planner.plan(running, Capacity(free, 0, 9), PassInfo(pass_no, NOW, 0.01))
        return plan.start, asked[1:]

    assert looked_at(2, 200) == ((), [1, 2])
    assert looked_at(3, 200) == ((), [])
    assert looked_at(4, 300 + TUNING.quantum + GROWTH - 1) == ((), [])
    assert looked_at(5, 300 + TUNING.quantum + GROWTH) == ((queue[1],), [1])
    assert looked_at(6, 300 + TUNING.quantum + GROWTH) == ((queue[1],), [1]), "it did not start"
    planner.queue.started(queue[1], PassInfo(6, NOW, 0.01))
    assert looked_at(7, 200) == ((), [2])
    fresh = RequestState(8, Pacer(TPOT), kv_tokens=100)
    planner.queue.stopped(fresh, RequestStatus.WAITING, PassInfo(7, NOW, 0.01))
    assert looked_at(8, 200) == ((fresh,), [2, 8])


def test_an_answer_that_turns_urgent_behind_a_blocked_one_is_looked_at():
    """It was too far down the line before, and nothing came or went since."""
    first_urgent = Pacer(TPOT, delivered=5, last_shown=NOW)
    big = RequestState(0, first_urgent, RequestStatus.HOST, Phase.ANSWERING, 5, 50, kv_tokens=5000)
    pacer = Pacer(TPOT, delivered=5, last_shown=NOW + 5)
    answer = RequestState(1, pacer, RequestStatus.HOST, Phase.ANSWERING, 5, 50, kv_tokens=90)
    thinkers = [RequestState(2 + i, Pacer(TPOT), kv_tokens=900) for i in range(BACKFILL_DEPTH)]
    planner = planner_with("pascal", [big, answer, *thinkers])
    runs = [RequestState(99, first_urgent, RequestStatus.RUNNING, Phase.ANSWERING, 5, 50)]
    room = Capacity(400, 0, 9)
    assert planner.plan(runs, room, PassInfo(1, NOW, 0.01)).start == ()
    assert planner.plan(runs, room, PassInfo(2, NOW + 5, 0.01)).start == (answer,)


def test_no_request_starts_ahead_of_an_overdue_thinker():
    """It is overdue by what it waited before it last ran, not by this wait."""
    thinker = RequestState(0, Pacer(TPOT), kv_tokens=900, credit=TUNING.overdue + 1, since_pass=1)
    small = RequestState(1, Pacer(TPOT), kv_tokens=20, since_pass=1)
    planner = planner_with("pascal", [thinker, small])
    running = [RequestState(9, Pacer(TPOT), RequestStatus.RUNNING, credit=TUNING.overdue + 1)]
    moment = PassInfo(1, NOW, 0.01)
    assert planner.policy.rank(thinker, moment, TUNING)[0] == OVERDUE
    assert planner.plan(running, Capacity(400, 0, 9), moment).start == ()


def test_backfill_counts_among_the_starts_of_a_pass():
    queue = [RequestState(i, Pacer(TPOT), kv_tokens=10) for i in range(MOST_STARTS - 1)]
    big = RequestState(500, Pacer(TPOT), kv_tokens=10**6)
    behind = [RequestState(501 + i, Pacer(TPOT), kv_tokens=10) for i in range(9)]
    planner = planner_with("pascal", [*queue, big, *behind])
    runs = [RequestState(999, Pacer(TPOT), RequestStatus.RUNNING, pausable=False)]
    plan = planner.plan(runs, Capacity(10**5, 0, 10**6), PassInfo(1, NOW, 0.01))
    assert (plan.blocked, plan.start) == (big, (*queue, behind[0]))


def test_less_than_a_quantum_of_room_is_for_those_that_end_within_it():
    big = RequestState(0, Pacer(TPOT), kv_tokens=10**6)
    unknown = RequestState(1, Pacer(TPOT), kv_tokens=10)
    ending = RequestState(2, Pacer(TPOT), kv_tokens=10, remaining=15)
    planner = planner_with("pascal", [big, unknown, ending])
    runs = [RequestState(999, Pacer(TPOT), RequestStatus.RUNNING, pausable=False)]

    def started(room):
        capacity = Capacity(room + GROWTH, 0, 9)
        return planner.plan(runs, capacity, PassInfo(1, NOW, 0.01)).start

    assert started(TUNING.quantum - 1) == (ending,)
    planner.queue.remove(ending)
    assert started(TUNING.quantum - 1) == ()
    assert started(TUNING.quantum + 10) == (unknown,)


def test_a_recount_counts_anew():
    """Also where a status has changed in the queue, as in a pass that failed."""
    request = RequestState(0, Pacer(TPOT), RequestStatus.HOST, kv_tokens=10)
    planner = planner_with("pascal", [request])
    request.status = RequestStatus.WAITING
    planner.queue.recount([request])
    assert planner.queue.lengths() == {("thinking", "waiting"): 1}


def test_an_answer_that_turns_urgent_while_it_is_first_in_line_starts_at_once():
    """Displacement failed for it as an answer with slack; that says nothing about it in a hurry."""
    pacer = Pacer(TPOT, delivered=5, last_shown=NOW + 1)
    answer = RequestState(0, pacer, RequestStatus.HOST, Phase.ANSWERING, 5, 50, kv_tokens=50)
    thinker = RequestState(1, Pacer(TPOT), RequestStatus.RUNNING, kv_tokens=90)
    planner = planner_with("pascal", [answer])
    calm = planner.plan([thinker], Capacity(10, 0, 4), PassInfo(1, NOW, 0.01))
    assert calm == Plan(blocked=answer, shortage="rank")
    hurried = planner.plan([thinker], Capacity(10, 0, 4), PassInfo(2, NOW + 1, 0.01))
    assert (hurried.pause, hurried.start) == ((thinker,), (answer,))


@pytest.mark.parametrize(("tpot", "lead"), [(0.05, 1.9), (0.05, 2.1), (0.5, 1.9), (0.5, 2.1)])
def test_how_long_an_answer_is_left_alone_follows_from_what_a_pause_costs(tpot, lead):
    """From `settle` stalls of lead on it may be displaced, whatever the pace of its reader."""
    last_shown = NOW + lead + (TUNING.guard - 1) * tpot + REACTION_PASSES * MOMENT.pass_s
    pacer = Pacer(tpot, delivered=5, last_shown=last_shown)
    answer = RequestState(0, pacer, RequestStatus.RUNNING, Phase.ANSWERING, 5, 50, kv_tokens=90)
    thinker = RequestState(1, Pacer(tpot), kv_tokens=50, since_pass=MOMENT.pass_no)
    plan = planner_with("pascal", [thinker]).plan([answer], Capacity(10, 0, 4), MOMENT)
    assert bool(plan.start) == (lead > TUNING.settle * TUNING.stall_s)


def test_an_answer_that_a_program_reads_stays_among_the_thinkers():
    """It is neither urgent before its first token nor paused for being ahead."""
    ahead = Pacer(TPOT, delivered=50, last_shown=NOW + 90)
    read, whole = (
        RequestState(
            seq, ahead, RequestStatus.RUNNING, Phase.ANSWERING, reader=reader, kv_tokens=90
        )
        for seq, reader in enumerate((Reader.HUMAN, Reader.PROGRAM))
    )
    since = MOMENT.pass_no
    thinker = RequestState(2, Pacer(TPOT), kv_tokens=50, since_pass=since)
    plan = planner_with("pascal", [thinker]).plan([read, whole], Capacity(10, 0, 4), MOMENT)
    assert plan.pause == (read,)
    later = RequestState(3, Pacer(TPOT), kv_tokens=50, since_pass=since)
    blocked = planner_with("pascal", [later]).plan([whole], Capacity(10, 0, 4), MOMENT)
    assert blocked == Plan(blocked=later, shortage="rank")
    whole.phase_tokens = TUNING.quantum
    later = RequestState(4, Pacer(TPOT), kv_tokens=50, since_pass=since)
    in_turn = planner_with("pascal", [later]).plan([whole], Capacity(10, 0, 4), MOMENT)
    assert in_turn.pause == (whole,), "served more than the thinker"
    first = RequestState(
        5, Pacer(TPOT), RequestStatus.HOST, Phase.ANSWERING, reader=Reader.PROGRAM, since_pass=since
    )
    assert POLICIES["pascal"].rank(first, MOMENT, TUNING) == (THINKING, 0)


def test_a_long_queue_starts_in_order_over_several_passes():
    """Planning a pass takes bounded time; nothing is lost and the order stays."""
    planner = Planner(POLICIES["pascal"], TUNING)
    queue = [RequestState(i, Pacer(TPOT), kv_tokens=10) for i in range(150)]
    running: list[RequestState] = []
    for m in queue:
        planner.queue.stopped(m, RequestStatus.WAITING, PassInfo(1, NOW, 0.01))
    for pass_no in (2, 3, 4):
        plan = planner.plan(running, Capacity(10**6, 0, 10**6), PassInfo(pass_no, NOW, 0.01))
        assert 0 < len(plan.start) <= MOST_STARTS
        for m in plan.start:
            planner.queue.started(m, PassInfo(pass_no, NOW, 0.01))
        running += plan.start
    assert running == queue
