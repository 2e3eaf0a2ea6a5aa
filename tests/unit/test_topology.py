"""Near targets among alike ones: what is chosen is hardly worse, and where all are equally near
nothing changes."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.policy.placement import ALIKE, Answer, Instance, Placement
from pascal_sglang.policy.site import FAR, SAME_HOST, SAME_RACK, Site
from pascal_sglang.sim import workload
from pascal_sglang.sim.__main__ import main
from pascal_sglang.sim.arms import ARMS
from pascal_sglang.sim.cluster import Setup, simulate
from pascal_sglang.sim.migration import Network
from pascal_sglang.sim.topology import Topology
from tests.unit.test_sim import SMALL

SITES = [Site(f"host{n}", f"rack{n // 2}") for n in range(4)]
TOKENS = st.integers(0, 400)


@st.composite
def clusters(draw, sites=tuple(SITES)):
    """Instances in any state, on some of the hosts."""
    return [
        Instance(
            index,
            site=draw(st.sampled_from(sites)),
            on_pace=draw(st.booleans()),
            free=draw(TOKENS),
            waiting=draw(st.integers(0, 50)),
            footprint=draw(TOKENS),
            reasoning=draw(st.integers(0, 3)),
            fits=draw(st.integers(0, 3)),
            pass_us=draw(st.integers(0, 9)),
            load=draw(st.integers(0, 9)),
            capacity=400,
        )
        for index in range(draw(st.integers(2, 7)))
    ]


def twice(instances):
    return [dataclasses.replace(i) for i in instances]


def placements(*, lazy, predict=False):
    return [Placement(quantum=20, lazy=lazy, predict=predict, near=near) for near in (False, True)]


ANSWERS = st.builds(
    Answer,
    current=st.just(0),
    kv_tokens=st.integers(0, 100),
    remaining=st.integers(1, 100),
    passes=st.just(0),
)


def test_how_far():
    here, beside, rack, far = SITES[0], Site("host0", "rack0"), SITES[1], SITES[2]
    assert [here.distance(s) for s in (here, beside)] == [SAME_HOST, SAME_HOST]
    assert [s.distance(here) for s in (rack, far)] == [SAME_RACK, FAR]
    assert Site().distance(Site()) == SAME_HOST


@given(clusters(sites=(Site(),)), ANSWERS, st.booleans(), st.booleans())
def test_where_all_are_equally_near_nothing_changes(instances, answer, lazy, predict):
    found = []
    for placement in placements(lazy=lazy, predict=predict):
        copies = twice(instances)
        source = copies[answer.current]
        found.append(
            (
                [placement.at_boundary(copies, answer) for _ in range(3)],
                [placement.place(copies, 5, source=source) for _ in range(3)],
                [i.index for i in placement.in_sight(copies, (), source)],
            )
        )
    assert found[0] == found[1]


@given(clusters(), ANSWERS)
def test_of_targets_with_as_much_room_the_nearest(instances, answer):
    blind, near = placements(lazy=True)
    best = blind.at_boundary(twice(instances), answer)
    chosen = near.at_boundary(twice(instances), answer)
    assert chosen.why == best.why
    here, there = instances[0], instances[chosen.target]
    most = instances[best.target]
    if there is here:
        assert best == chosen
        return
    assert near.enough(there, answer)
    assert there.on_pace == most.on_pace
    assert there.left >= (1 - ALIKE) * most.left
    assert here.site.distance(there.site) <= here.site.distance(most.site)
    for other in instances[1:]:
        if near.enough(other, answer) and other.on_pace == most.on_pace:
            nearer = here.site.distance(other.site) < here.site.distance(there.site)
            assert not (nearer and other.left >= (1 - ALIKE) * most.left)


@given(clusters(), st.booleans())
def test_of_places_that_are_alike_the_nearest(instances, predict):
    blind, near = placements(lazy=True, predict=predict)
    source = instances[0]
    best = blind.place(twice(instances), 5, source=source)
    chosen = near.place(twice(instances), 5, source=source)
    distance = [source.site.distance(i.site) for i in instances]
    assert instances[chosen].on_pace == instances[best].on_pace
    assert distance[chosen] <= distance[best]
    if not predict:
        weights = [i.footprint + i.waiting for i in instances]
        assert weights[chosen] <= (1 + ALIKE) * weights[best]
    assert near.place(twice(instances), 5) == blind.place(twice(instances), 5), "of a new request"


@given(clusters(), ANSWERS)
def test_by_the_papers_counts_the_nearest_of_equals(instances, answer):
    blind, near = placements(lazy=False)
    best, chosen = (p.at_boundary(twice(instances), answer) for p in (blind, near))
    if best.why == chosen.why == "fewest_there":
        targets = instances[best.target], instances[chosen.target]
        assert targets[0].reasoning == targets[1].reasoning
        here = instances[0].site
        assert here.distance(targets[1].site) <= here.distance(targets[0].site)


@given(clusters(), ANSWERS, st.booleans(), st.sampled_from([SAME_HOST, SAME_RACK]))
def test_no_request_moves_farther_than_its_kv_can(instances, answer, lazy, reach):
    placement = Placement(quantum=20, lazy=lazy, reach=reach)
    chosen = placement.at_boundary(instances, answer)
    assert instances[0].site.distance(instances[chosen.target].site) <= reach
    found = placement.reachable(instances, instances[0])
    assert instances[0] in found
    assert Placement(quantum=20, lazy=lazy).reachable(instances, instances[0]) is instances


def test_others_of_its_host_are_looked_at_among_many():
    placement = Placement(quantum=20, lazy=True, sight=4)
    instances = [Instance(n, site=Site(f"host{n // 8}")) for n in range(80)]
    found = placement.in_sight(instances, (77,), instances[77])
    assert len({i.index for i in found}) == len(found)
    assert [i.index for i in found[:4]] == [0, 1, 2, 3]
    beside = [i.index for i in found if i.site == instances[77].site]
    assert len(beside) == 5
    assert 77 in beside
    flat = [Instance(n) for n in range(80)]
    assert len(placement.in_sight(flat, (77,), flat[77])) == 5
    blind = Placement(quantum=20, lazy=True, sight=4, near=False)
    assert len(blind.in_sight(instances, (77,), instances[77])) == 5


TOPOLOGY = Topology(per_host=2, per_rack=2, host_token_s=1e-6, rack_token_s=1e-5, far_token_s=1e-3)


def test_a_transfer_takes_every_link_on_its_way():
    network = Network(SMALL, 8, TOPOLOGY)
    assert network.send(0, 1, 1000, 0.0) == pytest.approx(1e-3 + SMALL.migration_s)
    assert network.send(2, 4, 1000, 0.0) == pytest.approx(1.0 + SMALL.migration_s)
    # The link of the first rack is taken, for all of its hosts; that inside of a host is not.
    assert network.send(1, 6, 1000, 0.0) == pytest.approx(2.0 + SMALL.migration_s)
    assert network.send(2, 3, 1000, 0.5) == pytest.approx(1.001 + SMALL.migration_s)
    assert network.send(6, 7, 1000, 0.0) == pytest.approx(1e-3 + SMALL.migration_s)
    assert network.sent_tokens == [3000, 0, 2000]


@pytest.mark.parametrize(
    "change", [{"per_host": 0}, {"far_token_s": -1.0}, {"rack_token_s": 1e999}]
)
def test_a_topology_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=r"host has an instance|takes a time"):
        dataclasses.replace(TOPOLOGY, **change)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["paper", "pascal-migration"]))
def test_a_flat_topology_gives_the_same_run_as_none(seed, arm):
    """One host: `near` on or off, a topology or none."""
    work = workload.draw("arena-hard", 60, 2.0, seed)
    token_s = SMALL.migration_token_s
    one = Topology(per_host=4, per_rack=1, host_token_s=token_s, rack_token_s=0, far_token_s=0)
    runs = [
        simulate(
            Setup(cost=SMALL, instances=4, topology=topology),
            ARMS[arm].but(arm, near=near),
            work,
        )
        for topology, near in ((None, False), (None, True), (one, True))
    ]
    for run in runs[1:]:
        assert run.finished.tolist() == runs[0].finished.tolist()
        assert run.decisions == runs[0].decisions
        assert run.moved_tokens == runs[0].moved_tokens


def test_the_table_has_each_arm_with_near_off_and_on(capsys):
    asked = ["topology", "--requests", "60", "--seeds", "1", "--processes", "1", "--arms", "paper"]
    assert main(asked) == 0
    head, off, on, *_ = capsys.readouterr().out.splitlines()
    assert "GB between racks" in head
    assert (off.split("  ")[0], on.split("  ")[0]) == ("paper, anywhere", "paper, near first")
    assert off != on
