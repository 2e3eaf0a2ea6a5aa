"""What pipeline stages agree on, and that one which decides otherwise does not go on."""

from types import SimpleNamespace

import pytest

from pascal_sglang.engine import pipeline
from pascal_sglang.engine.pipeline import pipeline_of
from pascal_sglang.engine.tp_ranks import RanksDiverged

ALONE = SimpleNamespace(attn_tp_cpu_group=SimpleNamespace(size=lambda: 1))


@pytest.fixture
def stage(monkeypatch):
    def make(rank, of):
        parallel = SimpleNamespace(pp_size=of, pp_rank=rank, pp_async_batch_depth=1)
        monkeypatch.setattr(pipeline, "get_parallel", lambda: parallel)
        return pipeline_of(ALONE)

    return make


def test_every_stage_reads_the_first_ones_clock(stage, monkeypatch):
    stages = [stage(rank, 3) for rank in range(3)]
    times = iter([5.0, 6.0])
    monkeypatch.setattr(pipeline.clock, "now", lambda: next(times))
    for now in (5.0, 6.0):
        handed_on = stages[0].begin(["a request"])
        for each in stages[1:]:
            request, turn = handed_on
            each.hear(turn)
            handed_on = each.begin(handed_on)
        assert [each.now for each in stages] == [now] * 3
        assert request == "a request"
        for each in stages:
            each.decide(["r1", "r2"])
    assert {each.micro_batches for each in stages} == {4}


@pytest.mark.parametrize("decided", [["r2", "r1"], ["r1"], []])
def test_a_stage_that_decides_otherwise_ends(stage, decided):
    first, second = stage(0, 2), stage(1, 2)
    first.decide(["r1", "r2"])
    second.decide(decided)
    (turn,) = first.begin([])
    with pytest.raises(RanksDiverged, match="decided otherwise"):
        second.hear(turn)


def test_one_stage_reads_its_own_clock_and_says_nothing(stage):
    alone = stage(0, 1)
    alone.decide(["r"])
    assert alone.begin(["a request"]) == ["a request"]
    assert (alone.now, alone.micro_batches) == (None, 1)
