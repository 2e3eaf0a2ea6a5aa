"""Promises of forecasts, for every policy, under random situations."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pascal_sglang.policy import fast_forward
from pascal_sglang.policy.arrivals import GO_ON, Arrivals
from pascal_sglang.policy.calibration import Calibration
from pascal_sglang.policy.fairness import APART, TenantCounters
from pascal_sglang.policy.fast_forward import PRIORITIES, STEPS, THINKERS, Machine, Present
from pascal_sglang.policy.forecast import LEARNS, PORTION, Forecaster
from pascal_sglang.policy.forecast_errors import ARRIVAL, WAITING, WHEN, Estimate, Expected
from pascal_sglang.policy.kv_tier import Costs
from pascal_sglang.policy.outlook import ArrivalOutlook, Course
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.priorities import Priorities, with_priorities
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import Reader, RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase

NOW = 500.0
STEP_S = 0.02
INFO = PassInfo(20_000, NOW, STEP_S)
TUNING = Tuning(stall_s=0.004)
PRIORITISED = with_priorities(POLICIES["pascal"], Priorities())
ORDERS = {**POLICIES, "pascal with priorities": PRIORITISED}
THINKS, ANSWERS = Phase.REASONING, Phase.ANSWERING


def present(seq, status=RequestStatus.RUNNING, phase=THINKS, tokens=1, prompt=100, **more):
    pacer = Pacer(0.1)
    if phase is ANSWERS:
        pacer.deliver(NOW - tokens * STEP_S, tokens, STEP_S)
    limit = more.pop("limit", 1 << 30)
    state = RequestState(
        seq,
        pacer,
        status=status,
        phase=phase,
        phase_tokens=tokens,
        total_tokens=tokens,
        since=NOW - 1,
        since_pass=INFO.pass_no - 50,
        **more,
    )
    return Present(state=state, kv_tokens=prompt + tokens, limit=limit)


def outlook(
    requests,
    *,
    policy="pascal",
    capacity=60_000,
    slots=256,
    rate=0.0,
    prefill=0.0,
    batch=0,
    tenants=None,
):
    forecaster = Forecaster(ORDERS[policy], TUNING, 0.1)
    forecaster.batch, forecaster.tenants = batch, tenants
    if rate:
        for number in range(round(300 * rate)):
            forecaster.arrivals.add(NOW - 300 + number / rate, 100, True)
    machine = Machine(capacity=capacity, slots=slots, prefill_token_s=prefill)
    *steps, last = fast_forward.outlook(forecaster, requests, machine, INFO)
    assert steps == [None] * len(steps)
    assert len(steps) <= STEPS + 3 * len(requests) + 2
    return last


@st.composite
def situations(draw):
    found = []
    for seq in range(draw(st.integers(0, 40))):
        status = draw(st.sampled_from(RequestStatus))
        phase = (
            THINKS if status is RequestStatus.WAITING else draw(st.sampled_from([THINKS, ANSWERS]))
        )
        tokens = 0 if status is RequestStatus.WAITING else draw(st.integers(1, 9000))
        found.append(
            present(
                seq,
                status,
                phase,
                tokens,
                draw(st.integers(1, 3000)),
                reader=draw(st.sampled_from(Reader)),
                priority=draw(st.integers(0, 1)),
                limit=draw(st.sampled_from([1, 500, 1 << 30])),
            )
        )
    return found


@settings(max_examples=40)
@given(
    requests=situations(),
    policy=st.sampled_from(sorted(ORDERS)),
    capacity=st.integers(1, 100_000),
    slots=st.integers(1, 64),
    rate=st.sampled_from([0.0, 0.2, 3.0]),
)
def test_a_forecast_is_a_range_for_every_request_that_waits_for_its_answer(
    requests, policy, capacity, slots, rate
):
    given_before = [dataclasses.replace(r.state, pacer=None) for r in requests]
    found = outlook(
        requests, policy=policy, capacity=capacity, slots=slots, rate=rate, prefill=1e-4
    )
    assert set(found.requests) == {r.state for r in requests if r.state.phase is THINKS}
    for estimate in (*found.requests.values(), found.arrival.estimate(100)):
        assert 0 <= estimate.p10 <= estimate.p50 <= estimate.p90 < math.inf
    assert 0 <= found.arrival.waits_s < math.inf
    for before, request in zip(given_before, requests, strict=True):
        after = dataclasses.replace(request.state, pacer=None)
        assert dataclasses.asdict(after) == dataclasses.asdict(before), "looking changes nothing"
    again = outlook(
        requests, policy=policy, capacity=capacity, slots=slots, rate=rate, prefill=1e-4
    )
    assert again == found, "the same situation, the same forecast"


def test_alone_it_is_the_length_times_the_speed():
    alone = present(1, tokens=1)
    found = outlook([alone])
    median = Forecaster(POLICIES["pascal"], TUNING, 0.1).thinking.quantile(0.5, 1) - 1
    assert found.requests[alone.state].p50 == pytest.approx(median * STEP_S, rel=0.15)
    assert found.arrival.waits_s == 0


def test_of_a_known_length_the_range_is_that_of_the_errors():
    """What is left open is how fast the request comes along: less so the less of it is waiting."""
    runs = present(1, tokens=10, limit=50)
    waits = present(2, RequestStatus.HOST, tokens=3000, limit=50)
    before = [present(n, tokens=10, prompt=1000) for n in range(3, 6)]
    for wide, requests in ((False, [runs]), (True, [waits, *before])):
        found = outlook(requests, capacity=5000).requests[requests[0].state]
        assert found.p10 < found.p50 < found.p90
        assert (found.p90 / found.p10 > 3) is wide


def test_what_came_of_forecasts_makes_the_next_ones():
    """Every answer takes twice the time that is forecast for its length."""
    alone = present(1, tokens=10, limit=90)
    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    calibration = Calibration(errors=forecaster.errors)

    def look():
        machine = Machine(capacity=60_000, slots=256)
        *_, last = fast_forward.outlook(forecaster, [alone], machine, INFO)
        return last

    first = look()
    course = first.courses[alone.state]
    seconds = course.expected(100).seconds
    for number in range(60):
        state = present(100 + number).state
        calibration.forecast(state, NOW, look().requests[alone.state], course)
        calibration.began(state, NOW + 2 * seconds, 100)
    second = look().requests[alone.state]
    assert second.p50 == pytest.approx(2 * seconds, rel=0.02)
    assert second.p90 / second.p10 < 1.2


def test_requests_that_will_come_think_as_long_as_those_that_came():
    """Budgets end the thoughts here: nothing is known of how long they would have got."""
    forecaster = Forecaster(POLICIES["fcfs"], TUNING, 0.1)
    for seq in range(300):
        forecaster.ended(present(seq).state, THINKS, 100, cut=True)
        forecaster.arrivals.add(NOW - 300 + seq, 100, True)
    assert forecaster.thoughts.quantile(0.9) < 150
    assert forecaster.thinking.quantile(0.9) > 1000

    def answer_of_one_that_comes():
        *_, last = fast_forward.outlook(forecaster, [], Machine(capacity=4000, slots=256), INFO)
        return last.arrival

    assert answer_of_one_that_comes().times[-1] < 20, "nine of ten answer within that"
    forecaster.thoughts = forecaster.thinking
    assert answer_of_one_that_comes().times[-1] > 20


@example(pace=[(4.0, 2.2250738585072014e-308)], length=2.0, more_s=0.0, tokens=0.0)
@given(
    pace=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 500)), min_size=1, max_size=28),
    length=st.floats(0, 1e6),
    more_s=st.floats(-5, 5),
    tokens=st.floats(0, 1e4),
)
def test_a_course_says_when_and_how_much_of_it_is_waiting(pace, length, more_s, tokens):
    times = [0.0, *itertools.accumulate(seconds for seconds, _ in pace)]
    counts = [tokens, *itertools.accumulate((gain for _, gain in pace), initial=tokens)][1:]
    course = Course(ARRIVAL, times, counts, STEP_S, tokens, tokens, more_s)
    seconds, waits = course.expected(length)
    assert 0 <= seconds < math.inf
    assert 0 <= waits <= 1
    assert course.expected(length + 100).seconds >= seconds
    assert isinstance(course.expected(length), Expected)


def test_a_budget_bounds_the_range():
    alone = present(1, tokens=10, limit=50)
    found = outlook([alone]).requests[alone.state]
    assert found.p90 == pytest.approx(50 * STEP_S, rel=0.2)


def test_who_came_further_waits_for_who_came_less_far():
    """Memory for one of two: under `pascal` the one that has run less goes first."""
    far = present(1, tokens=3000, prompt=100)
    near = present(2, RequestStatus.HOST, tokens=10, prompt=1000)
    alone, both, first_come = (
        outlook(requests, policy=policy, capacity=3700, batch=100).requests[far.state].p50
        for requests, policy in (([far], "pascal"), ([far, near], "pascal"), ([far, near], "fcfs"))
    )
    assert both > alone + 1.5
    assert first_come == pytest.approx(alone, abs=1), "nothing displaces it there"


def test_a_long_thinker_is_told_of_those_that_will_come_before_it():
    """The forecast that ignores demotion and arrivals is the one without arrivals."""
    long = present(1, tokens=6000)
    others = [present(n, tokens=100 * n) for n in range(2, 10)]
    calm = outlook([long, *others], capacity=12_000)
    busy = outlook([long, *others], capacity=12_000, rate=0.7)
    assert busy.requests[long.state].p50 > 1.5 * calm.requests[long.state].p50
    assert busy.arrival.estimate(100).p50 < 0.5 * busy.requests[long.state].p50


def test_memory_that_is_full_shows_as_backlog():
    waiting = [present(n, RequestStatus.WAITING, tokens=0, prompt=900) for n in range(60)]
    running = [present(100 + n, tokens=400, prompt=900) for n in range(10)]
    short = outlook([*running, *waiting], capacity=15_000)
    ample = outlook([*running, *waiting], capacity=10**6)
    assert short.arrival.waits_s > 10
    assert ample.arrival.waits_s == 0
    assert short.arrival.estimate(100).p50 > ample.arrival.estimate(100).p50


def test_a_longer_prompt_is_prefilled_longer():
    arrival = outlook([], prefill=1e-3, rate=0.05).arrival
    short, long = arrival.estimate(100), arrival.estimate(5100)
    assert long.p50 - short.p50 == pytest.approx(5.0, rel=0.03)


def test_prefills_of_those_before_it_take_their_time_however_long_it_is():
    waiting = [
        present(n, RequestStatus.WAITING, tokens=0, prompt=10_000, limit=100) for n in range(100)
    ]
    courses = outlook(waiting, capacity=10**7, prefill=1e-4).courses
    # In cohorts, whose members share what all of them take: 100 s for 1,000,000 tokens.
    times = sorted(courses[each.state].expected(50.0).seconds for each in waiting)
    assert 1 < times[0] < 25
    assert 80 < times[-1] < 120
    assert len({round(seconds) for seconds in times}) >= THINKERS - 1


def test_a_short_prompt_among_long_ones_answers_no_sooner_than_it_thinks():
    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    forecaster.arrivals.add(NOW, 10_000, True)
    machine = Machine(capacity=10**6, slots=256, prefill_token_s=1e-3)
    *_, last = fast_forward.outlook(forecaster, [], machine, INFO)
    alone = outlook([]).arrival.estimate(100).p50
    assert last.arrival.estimate(100).p50 == pytest.approx(alone, rel=0.1)


def test_a_request_that_does_not_think_answers_with_its_first_token():
    arrival = outlook([]).arrival
    assert arrival.estimate(0, thinks=False).p90 < 0.6 < arrival.estimate(0).p50


def test_the_speed_is_measured():
    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    one, other = present(1, tokens=100).state, present(2, tokens=10).state
    forecaster.look([one, other], 10.0)
    for state in (one, other):
        state.phase_tokens += 50
        state.total_tokens += 50
    forecaster.look([one, other], 12.0)
    assert forecaster.token_s == pytest.approx(2 / 50)
    assert forecaster.batch == 2


def test_a_pause_says_nothing_of_the_speed():
    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    state = present(1, tokens=100).state
    forecaster.look([state], 10.0)
    state.enter(RequestStatus.HOST, 0, 11.0)
    state.enter(RequestStatus.RUNNING, 0, 19.0)
    state.total_tokens += 50
    forecaster.look([state], 20.0)
    assert forecaster.token_s == 0


def test_memory_of_what_was_seen_is_bounded():
    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    for seq in range(300):
        state = present(seq, tokens=50).state
        forecaster.look([state], 10.0 + seq)
        forecaster.ended(state, THINKS, 60)
    assert len(forecaster._seen) == 1


@given(gaps=st.lists(st.floats(0.01, 30), min_size=30, max_size=80))
def test_the_rate_of_arrivals_is_that_of_late(gaps):
    arrivals = Arrivals()
    times = list(itertools.accumulate(gaps))
    for at in times:
        arrivals.add(at, 10, True)
    rate = arrivals.rates(times[-1]).first
    assert 0 < rate < math.inf
    assert arrivals.rates(times[-1] + 600).first < 0.01 * rate + 1e-9, "it fades"
    assert arrivals.prompt == pytest.approx(10)


def test_a_steady_rate_is_found():
    arrivals = Arrivals()
    for number in range(400):
        arrivals.add(number / 2, 10, number % 4 > 0)
    assert arrivals.rates(200.0).first == pytest.approx(2.0, rel=0.05)
    assert arrivals.thinks == pytest.approx(0.75, abs=0.02)


def test_an_outlook_survives_json():
    import json

    arrival = outlook([present(1)], rate=0.5).arrival
    again = ArrivalOutlook(**json.loads(json.dumps(dataclasses.asdict(arrival))))
    assert again.estimate(321) == arrival.estimate(321)


def course(made):
    return Course(made, [0.0, 100.0], [0.0, 5000.0], STEP_S)


def test_what_came_of_a_forecast_is_counted_once_for_each_time_it_was_made():
    calibration = Calibration()
    state = present(1).state
    calibration.forecast(state, 10.0, Estimate(1, 2, 3), course(ARRIVAL))
    for _ in range(3):
        calibration.forecast(state, 12.0, Estimate(5, 6, 7), course("0s"))
    calibration.forecast(state, 30.0, Estimate(0, 0.5, 1), course("10s"))
    came = calibration.began(state, 18.5, 700)
    assert came == [(ARRIVAL, "late"), ("0s", "inside"), ("10s", "early")]
    assert calibration.began(state, 19.0, 700) == []
    assert calibration.counts["0s"]["by_p50"] == 0
    assert set(calibration.counts) == set(WHEN)


def test_a_range_that_is_over_counts_as_late_before_the_answer_begins():
    """Once: those that are very late would be learnt from last."""
    calibration = Calibration()
    state = present(1).state
    for at, name in ((10.0, ARRIVAL), (12.0, WAITING), (14.0, "0s"), (15.0, "0s")):
        calibration.forecast(state, at, Estimate(1, 2, 3), course(name))
    *_, wider = calibration.errors.of(ARRIVAL)
    assert wider > 1
    assert calibration.errors.of(WAITING)[1:] == (0.0, 0.0)
    assert not calibration.counts[ARRIVAL]
    calibration.began(state, 16.0, 700)
    assert calibration.errors.of(ARRIVAL)[-1] == wider
    assert [calibration.counts[name]["late"] for name in (ARRIVAL, WAITING)] == [1, 1]


def test_what_goes_elsewhere_is_forgotten():
    calibration = Calibration()
    here, gone = present(1).state, present(2).state
    for state in (here, gone):
        calibration.forecast(state, 10.0, Estimate(1, 2, 3), course(ARRIVAL))
    assert calibration.followed() == {here, gone}
    calibration.gone(gone)
    assert calibration.followed() == {here}
    assert calibration.began(gone, 12.0, 9) == []
    assert calibration.began(here, 12.0, 9) == [(ARRIVAL, "inside")]


def test_a_request_without_an_answer_says_nothing():
    calibration = Calibration()
    state = present(1).state
    calibration.forecast(state, 10.0, Estimate(1, 2, 3), course(ARRIVAL))
    calibration.gone(state)
    assert calibration.began(state, 18.5, 700) == []


@pytest.mark.parametrize("priorities", [1, 2, 700])
def test_however_many_kinds_there_are_cohorts_are_few(priorities):
    requests = [
        present(
            n,
            RequestStatus.WAITING,
            tokens=0,
            reader=list(Reader)[n % 2],
            priority=n * 7 % priorities,
        )
        for n in range(700)
    ]
    forecaster = Forecaster(PRIORITISED, TUNING, 0.1)
    run = fast_forward.FastForward(forecaster, Machine(capacity=30_000, slots=256), INFO)
    for _ in run.take_in(requests):
        pass
    assert sum(cohort.count for cohort in run.cohorts) == len(requests)
    assert len(run.cohorts) <= THINKERS + 2 * min(priorities, PRIORITIES) + 1


def test_one_that_begins_to_answer_meanwhile_says_nothing_of_those_like_it():
    requests = [present(n, tokens=100) for n in range(3 * PORTION)]

    def come():
        yield from requests
        for each in requests[:: 2 * THINKERS]:
            each.state.phase, each.state.phase_tokens = ANSWERS, 1

    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    *_, found = fast_forward.outlook(forecaster, come(), Machine(capacity=10**6, slots=999), INFO)
    thinkers = [r.state for r in requests if r.state.phase is THINKS]
    assert min(found.requests[state].p50 for state in thinkers) > 1


def test_however_many_requests_little_is_done_at_a_time():
    requests = [present(n, tokens=n % 900 + 1, prompt=50) for n in range(700)]
    requests += [present(1000 + n, phase=ANSWERS, tokens=9, prompt=50) for n in range(300)]
    seen = [0]

    def come():
        for each in requests:
            seen[0] += 1
            yield each

    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    forecast = fast_forward.outlook(forecaster, come(), Machine(capacity=30_000, slots=256), INFO)
    found, before, steps = None, 0, 0
    while found is None:
        found = next(forecast)
        steps += 1
        assert seen[0] - before <= PORTION
        before = seen[0]
    assert steps > 2 * len(requests) / PORTION
    assert len(found.requests) == 700
    assert found == outlook(requests, capacity=30_000)

    look, before, seen[0] = (
        forecaster.looking((r.state for r in come()), lambda: NOW, Costs()),
        0,
        0,
    )
    for _ in look:
        assert seen[0] - before <= PORTION
        before = seen[0]
    assert len(forecaster._seen) == 1000


def test_a_look_that_takes_several_passes_measures_each_request_by_its_own_time():
    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    states = [present(n, tokens=100).state for n in range(3 * PORTION)]
    for begins in (10.0, 20.0):
        times = itertools.count(begins, 0.01)
        for _ in forecaster.looking(states, lambda times=times: next(times), Costs()):
            pass
        for state in states:
            state.phase_tokens += 500
            state.total_tokens += 500
    assert forecaster.token_s == pytest.approx(0.02)


def counters(ahead_s=20.0):
    """Of a tenant that is ahead of another."""
    found = TenantCounters(10_000, TUNING.tenant_bound, lambda request: 1)
    found._served = {"heavy": 100.0 + ahead_s, "light": 100.0}
    found._begins_at = 100.0
    found._see_who_is_ahead(["heavy", "light"])
    return found


def crowd(count=30, light="light"):
    running = [present(n, tokens=400, prompt=900, tenant="heavy") for n in range(10)]
    waiting = [
        present(100 + n, RequestStatus.WAITING, tokens=0, prompt=900, tenant="heavy")
        for n in range(count)
    ]
    return [
        *running,
        *waiting,
        present(500, RequestStatus.WAITING, tokens=0, prompt=900, tenant=light),
    ]


def test_the_tenant_that_is_not_ahead_is_forecast_to_come_first():
    """As the order of fairness has it; without it, whoever came first does."""
    requests = crowd()
    first, light = requests[10].state, requests[-1].state
    plain = outlook(requests, capacity=14_000)
    fair = outlook(requests, capacity=14_000, tenants=counters())
    assert plain.requests[first].p50 < plain.requests[light].p50
    assert fair.requests[light].p50 < 0.7 * plain.requests[light].p50
    assert fair.requests[light].p50 < fair.requests[first].p50
    assert plain.by_tenant == {}
    assert list(fair.by_tenant) == ["heavy", "light"]
    assert fair.usual is fair.by_tenant["heavy"]
    assert fair.by_tenant["heavy"].waits_s > fair.by_tenant["light"].waits_s


def test_a_tenant_that_is_ahead_is_not_put_off_for_ever():
    """The other one is charged for what it gets in the forecast, too."""
    requests = crowd()
    for number in range(30):
        requests.append(
            present(600 + number, RequestStatus.WAITING, tokens=0, prompt=900, tenant="light")
        )
    far, near = (
        outlook(requests, capacity=14_000, tenants=counters(ahead_s)).requests[requests[10].state]
        for ahead_s in (1e6, 6.0)
    )
    assert near.p50 < far.p50


@settings(max_examples=25)
@given(
    requests=situations(),
    tenants=st.lists(st.sampled_from("abcde"), min_size=40, max_size=40),
    served=st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 100)),
    rate=st.sampled_from([0.0, 1.0]),
)
def test_whoever_is_ahead_everybody_gets_a_forecast(requests, tenants, served, rate):
    for request, tenant in zip(requests, tenants, strict=False):
        request.state.tenant = tenant
    known = TenantCounters(5_000, TUNING.tenant_bound, lambda request: 1)
    known._served = dict(served)
    before = dict(known._served), dict(known.ahead)
    found = outlook(requests, capacity=5_000, rate=rate, tenants=known)
    assert (known._served, known.ahead) == before, "looking changes nothing"
    assert set(found.requests) == {r.state for r in requests if r.state.phase is THINKS}
    assert len(found.by_tenant) == min(APART, len({r.state.tenant for r in requests}))
    for estimate in (*found.requests.values(), found.usual.estimate(100)):
        assert 0 <= estimate.p10 <= estimate.p50 <= estimate.p90 < math.inf


def test_the_time_of_prefills_is_not_that_of_decoding():
    """Of ten seconds they took six; of two, nearly all, which says nothing; a few are usual."""
    forecaster, costs = Forecaster(POLICIES["pascal"], TUNING, 0.1), Costs()
    state = present(1, tokens=100).state
    forecaster.look([state], 10.0, costs)
    costs.prefilled(1000, 6.0)
    state.total_tokens += 100
    forecaster.look([state], 20.0, costs)
    assert forecaster.token_s == pytest.approx(4 / 100)
    costs.prefilled(1000, 1.9)
    state.total_tokens += 1
    forecaster.look([state], 22.0, costs)
    assert forecaster.token_s == pytest.approx(4 / 100)
    costs.prefilled(1000, 2.0)
    state.total_tokens += 100
    forecaster.look([state], 32.0, costs)
    assert forecaster.token_s == pytest.approx((1 - LEARNS) * 4 / 100 + LEARNS * 10 / 100)


def test_a_burst_out_of_idleness_is_not_a_load_without_end():
    """On a server that has just started, and on one that has been idle for an hour."""
    for idle_s in (0.0, 3600.0):
        arrivals = Arrivals()
        arrivals.rates(0.0)
        for number in range(60):
            arrivals.add(idle_s + number / 20, 10, True)
        for later_s in (3.0, 30.0, 120.0):
            rates = arrivals.rates(idle_s + later_s)
            comes = rates.between(0.0, 300.0)
            assert 0 < comes < 60 * (GO_ON + 0.5), "it was thousands on the first one"
            assert rates.between(0.0, 100.0) + rates.between(100.0, 300.0) == pytest.approx(comes)


def test_what_has_gone_on_for_long_goes_on():
    arrivals = Arrivals()
    for number in range(3600):
        arrivals.add(number / 2, 10, True)
    assert arrivals.rates(1800.0).between(0.0, 600.0) == pytest.approx(2.0 * 600, rel=0.2)
    assert arrivals.rates(2400.0).between(0.0, 600.0) < 10, "once it is over none comes"


def test_the_first_forecast_of_a_burst_is_not_of_a_load_without_end():
    """Nothing has been learnt; a step has been measured with one request alone."""
    forecaster = Forecaster(POLICIES["pascal"], TUNING, 0.1)
    forecaster.token_s, forecaster.batch = STEP_S, 1.0
    forecaster.arrivals.rates(NOW - 100)
    requests = [present(n, tokens=1, prompt=500) for n in range(20)]
    requests += [
        present(20 + n, RequestStatus.WAITING, tokens=0, prompt=500, limit=500) for n in range(20)
    ]
    for number in range(40):
        forecaster.arrivals.add(NOW - 2 + number / 20, 500, True)
    machine = Machine(capacity=30_000, slots=256)
    *_, last = fast_forward.outlook(forecaster, requests, machine, INFO)
    for each in requests[20:]:
        length = last.courses[each.state].expected(500).seconds
        assert 500 * STEP_S < length < 8 * 500 * STEP_S
