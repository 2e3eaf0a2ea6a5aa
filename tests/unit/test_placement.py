"""Where requests go: the paper's algorithms to the letter, and what `pascal` does instead."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.policy.placement import Answer, Decision, Instance, Placement


def paper(**more):
    return Placement(quantum=100, lazy=False, **more)


def pascal(**more):
    return Placement(quantum=100, lazy=True, **more)


def roomy(index, **more):
    return Instance(index, **{"free": 10_000, **more})


def test_a_new_request_goes_to_the_smallest_footprint_on_pace():
    instances = [
        roomy(0, footprint=10, on_pace=False),
        roomy(1, footprint=50),
        roomy(2, footprint=40),
    ]
    assert paper().place(instances, 5) == 2


def test_with_nobody_on_pace_to_the_smallest_footprint_of_all():
    instances = [roomy(0, footprint=10, on_pace=False), roomy(1, footprint=5, on_pace=False)]
    assert paper().place(instances, 5) == 1


def test_a_burst_between_two_status_messages_is_spread():
    instances = [roomy(i) for i in range(4)]
    placement = paper()
    placed = [placement.place(instances, 20) for _ in range(40)]
    assert [placed.count(i) for i in range(4)] == [10] * 4


def test_a_held_prefix_weighs_against_footprint():
    instances = [roomy(0, footprint=100), roomy(1, footprint=150)]
    assert pascal().place(instances, 80, {1: 60}) == 1
    assert instances[1].waiting == 20, "the rest of the prompt alone is prefilled"
    assert pascal().place([roomy(0, footprint=80), roomy(1, footprint=150)], 80, {1: 60}) == 0


def test_a_new_request_goes_where_its_answer_is_expected_first():
    """Fast passes outweigh some footprint, and much footprint outweighs them; so does a long queue
    of prefills; an idle instance is as fast as the fastest known."""
    busy = {"load": 20, "batch": 20, "prefill_ns": 100_000, "capacity": 1000}
    slow = roomy(0, footprint=500, pass_us=40_000, **busy)
    fast = roomy(1, footprint=700, pass_us=35_000, **busy)
    assert pascal(predict=True).place([slow, fast], 5) == 1
    fast = roomy(1, footprint=1700, pass_us=35_000, **busy)
    assert pascal(predict=True).place([slow, fast], 5) == 0
    fast = roomy(1, pass_us=35_000, waiting=60_000, **busy)
    assert pascal(predict=True).place([slow, fast], 5) == 0
    idle = roomy(0, pass_us=90_000)
    assert pascal(predict=True).place([idle, roomy(1, pass_us=35_000, **busy)], 5) == 0


def test_a_burst_is_spread_by_prediction_too():
    instances = [roomy(i, load=10, batch=10, pass_us=30_000) for i in range(4)]
    placement = pascal(predict=True)
    placed = [placement.place(instances, 20) for _ in range(40)]
    assert [placed.count(i) for i in range(4)] == [10] * 4


@pytest.mark.parametrize("noise_us", [5_000, 9_000])
def test_a_burst_is_spread_however_the_passes_were_measured(noise_us):
    """Measured lengths lag behind and include a long prefill, which marks the one that had it."""
    few = {"load": 2, "batch": 2}
    instances = [roomy(0, pass_us=4_000, **few), roomy(1, pass_us=noise_us, **few)]
    placement = pascal(predict=True)
    for _ in range(40):
        placement.place(instances, 20)
    assert abs(instances[0].load - instances[1].load) <= 8


def test_one_decision_looks_at_a_bounded_number_of_instances():
    """Every instance has its turn, however many there are."""
    instances = [roomy(i) for i in range(100)]
    placement = pascal(sight=16)
    seen = set()
    for _ in range(100):
        candidates = placement.in_sight(instances)
        assert len(candidates) == 16
        seen |= {i.index for i in candidates}
        placement.place(candidates, 5)
    assert seen == set(range(100))
    assert placement.in_sight(instances[:16]) == instances[:16]


def test_an_answer_goes_where_fewest_think_without_counting_itself():
    instances = [roomy(0, reasoning=3), roomy(1, reasoning=3), roomy(2, reasoning=1)]
    decision = paper().at_boundary(instances, Answer(0, 50, 200))
    assert (decision.target, decision.why) == (2, "fewest_there")
    instances = [roomy(0, reasoning=3), roomy(1, reasoning=2)]
    assert paper().at_boundary(instances, Answer(0, 50, 200)).why == "fewest_here", "a tie stays"


def test_with_nobody_on_pace_fresh_answers_count_as_well():
    instances = [
        roomy(0, reasoning=4, fresh=0, on_pace=False),
        roomy(1, reasoning=1, fresh=3, on_pace=False),
        roomy(2, reasoning=2, fresh=0, on_pace=False),
    ]
    decision = paper().at_boundary(instances, Answer(0, 50, 200))
    assert (decision.target, decision.why) == (2, "none_on_pace")


@pytest.mark.parametrize(("adaptive", "target"), [(True, 0), (False, 1)])
def test_the_override_stays_with_memory_rather_than_go_without(adaptive, target):
    instances = [roomy(0, reasoning=5), Instance(1, free=100)]
    assert paper(adaptive=adaptive).at_boundary(instances, Answer(0, 50, 200)).target == target


def test_enough_is_the_request_and_a_quantum_or_less_if_it_ends_sooner():
    placement, there = paper(), Instance(1, free=149)
    assert not placement.enough(there, Answer(0, 50, 200))
    assert placement.enough(there, Answer(0, 50, 99))
    there.arriving = 1
    assert not placement.enough(there, Answer(0, 50, 99)), "what is on its way has a claim"
    assert placement.enough(Instance(0, free=100), Answer(0, 50, 200)), "its own KV is paid here"


def test_lazily_only_pressure_moves_and_only_to_room():
    full, half = Instance(0, free=10), Instance(2, free=400)
    assert pascal().at_boundary([roomy(0, reasoning=9), roomy(1)], Answer(0, 50, 200)).target == 0
    decision = pascal().at_boundary([full, roomy(1), half], Answer(0, 50, 200))
    assert (decision.target, decision.why) == (1, "room_there")
    decision = pascal().at_boundary(
        [Instance(0, free=10), Instance(1, free=20)], Answer(0, 50, 200)
    )
    assert (decision.target, decision.why) == (0, "room_nowhere")


def test_what_helps_nobody_does_not_move():
    assert pascal().at_boundary([Instance(0), roomy(1)], Answer(0, 50, 8)).why == "nearly_done"
    busy = [Instance(0, migrations=4), roomy(1)]
    assert pascal().at_boundary(busy, Answer(0, 50, 200)).why == "too_many_moves"


def test_a_failed_move_is_taken_back():
    here, there = Instance(0, reasoning=1), roomy(1)
    placement = pascal()
    assert placement.at_boundary([here, there], Answer(0, 50, 200)).target == 1
    assert (there.arriving, there.footprint, there.fresh, there.migrations) == (50, 50, 1, 1)
    placement.moved(here, there, 50, done=False)
    assert (there.arriving, there.footprint, there.fresh, there.migrations) == (0, 0, 0, 0)
    assert (here.fresh, here.migrations) == (1, 0)


instances = st.lists(
    st.builds(
        Instance,
        index=st.just(0),
        on_pace=st.booleans(),
        footprint=st.integers(0, 500),
        reasoning=st.integers(0, 5),
        fresh=st.integers(0, 5),
        free=st.integers(0, 500),
    ),
    min_size=1,
    max_size=5,
)


@given(instances, st.booleans(), st.lists(st.integers(1, 300), max_size=30))
def test_answers_never_move_to_where_they_do_not_fit_unless_nobody_has_room(many, lazy, sizes):
    for index, instance in enumerate(many):
        instance.index = index
    placement = Placement(quantum=100, lazy=lazy)
    for turn, kv_tokens in enumerate(sizes):
        answer = Answer(turn % len(many), kv_tokens, 200)
        fitted = {i.index: placement.enough(i, answer) for i in many}
        decision = placement.at_boundary(many, answer)
        assert 0 <= decision.target < len(many)
        if decision.target != answer.current:
            assert fitted[decision.target] or (not lazy and not fitted[answer.current])
        assert all(i.migrations <= placement.max_migrations for i in many)


def test_an_answer_moves_only_where_there_are_windows_and_states_for_it():
    """KV alone is not all that a request takes of some models."""
    here, there = roomy(0, free=10), roomy(1, fits=0)
    answer = Answer(0, 1000, 500)
    assert pascal().at_boundary([here, there], answer).why == "room_nowhere"
    there.fits = 1
    placement = pascal()
    assert placement.at_boundary([here, there], answer) == Decision(1, "room_there")
    assert there.fits == 0, "until the next report"
    placement.moved(here, there, 1000, done=False)
    assert there.fits == 1
    assert pascal().enough(roomy(0, fits=0), answer), "what it has there it keeps"


def test_requests_on_their_way_count_against_what_fits():
    instances = [roomy(0, fits=1)]
    for _ in range(2):
        paper().place(instances, 20)
        assert instances[0].fits == 0
