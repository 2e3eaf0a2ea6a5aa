"""Sampling from ServeGen distributions: the committed table, and data of the same form."""

import json
import tarfile

import numpy as np
import pytest

from evals import sources
from evals.load.lines import WorkloadError
from evals.sources import servegen
from evals.sources.draw import Ask
from evals.sources.servegen_data import Gaps, Histogram, read
from evals.workload import Recipe, build


def ask(requests, seed=0, **more):
    first, second = (np.random.default_rng([seed, n]) for n in (0, 2))
    return Ask(requests=requests, rng=first, extra_rng=second, **more)


def outputs(items):
    return [item.output_tokens for item in items]


def histogram(**weights):
    return str({int(key[1:]): weight for key, weight in weights.items()})


@pytest.fixture
def data(tmp_path):
    """Client 0 sends 60 requests at midnight; client 4 sends 180 at six, in one of two ways."""
    empty = {"input_tokens": "{}", "output_tokens": "{}", "reason_ratio": "{}"}
    night = {
        "input_tokens": histogram(_10=0.5, _20=0.5),
        "output_tokens": histogram(_100=1.0),
        "reason_ratio": "{0.5: 1.0, 0.7: 0.0}",
    }
    morning = {
        "input_tokens": histogram(_777=1.0),
        "output_tokens": histogram(_40=0.25, _80=0.75),
        "reason_ratio": "{0.9: 1.0}",
    }
    folder = tmp_path / "r1"
    folder.mkdir()
    (folder / "chunk-0-trace.csv").write_text("0,0.1,1,Gamma,1e6,1e-5\n600,0,0,,0,0\n")
    (folder / "chunk-0-dataset.json").write_text(json.dumps({"0": night, "21600": empty}))
    (folder / "chunk-4-trace.csv").write_text("0,0,0,,0,0\n21600,0.3,1,Weibull,1.0,3.0\n")
    (folder / "chunk-4-dataset.json").write_text(json.dumps({"0": empty, "21600": morning}))
    return folder


def test_quantiles_of_a_mixture():
    parts = [
        (Histogram(np.array([10.0, 20.0]), np.array([0.5, 0.5])), 1.0),
        (Histogram(np.array([30.0]), np.array([1.0])), 3.0),
    ]
    # Reached: 10 at 0.125, 20 at 0.25, 30 at 1.
    levels = [0.0, 0.125, 0.2, 0.25, 0.3, 1.0]
    assert servegen.quantiles(parts, levels).tolist() == [10, 10, 20, 20, 30, 30]


def test_a_table_weighs_clients_by_their_requests(data, tmp_path, capsys):
    out = tmp_path / "table.json"
    assert servegen.main([str(data), "--out", str(out)]) == 0
    raw = json.loads(out.read_text())
    assert (raw["licence"], raw["url"]) == ("Apache-2.0", "https://github.com/alibaba/ServeGen")
    assert [(row["client"], row["weight"]) for row in raw["clients"]] == [(0, 0.25), (4, 0.75)]
    assert set(raw["clients"][1]["prompt"]) == {777}
    items = build(Recipe(source="servegen-r1", path=out, requests=4000))
    late = [item for item in items if item.prompt_tokens == 777]
    assert len(late) / len(items) == pytest.approx(0.75, abs=0.03)
    # 0.9 of 80 are 72 reasoning tokens with the marker.
    longest = max(late, key=lambda item: item.output_tokens)
    assert (longest.thinking_tokens, longest.answer_tokens) == (71, 8)
    assert all(10 <= i.prompt_tokens <= 20 for i in items if i.prompt_tokens != 777)


def test_the_committed_table_has_the_known_shape():
    """Rate-weighted percentiles of the data: prompt p50 208, p95 6,714; output p50 792, p95 5,701,
    p99 12,607; reason ratio p5 0.32, p50 0.76."""
    drawn = sources.draw("servegen-r1", ask(100_000))
    output = drawn.thinking + 1 + drawn.answer
    share = (drawn.thinking + 1) / output
    assert np.percentile(drawn.prompt, [50, 95]) == pytest.approx([208, 6714], rel=0.05)
    assert np.percentile(output, [50, 95, 99]) == pytest.approx([792, 5701, 12607], rel=0.05)
    assert np.percentile(share, [5, 50]) == pytest.approx([0.32, 0.76], abs=0.02)
    assert servegen.TABLE.stat().st_size < 50_000


def test_scales_are_apart():
    full, half = (build(Recipe(source="servegen-r1", scale=scale)) for scale in (1.0, 0.5))
    small = build(Recipe(source="servegen-r1", prompt_scale=0.5))
    for a, b, c in zip(full, half, small, strict=True):
        assert b.prompt_tokens == a.prompt_tokens
        assert b.output_tokens == pytest.approx(a.output_tokens / 2, abs=1)
        assert c.prompt_tokens == pytest.approx(a.prompt_tokens / 2, abs=1)
        assert outputs([c]) == outputs([a])


def test_clients_arrive_in_their_own_way(data):
    clients = read(data)
    times, who = servegen.arrivals(np.random.default_rng(0), clients, 70, 0.0)
    # Evenly every 10 s up to 600 s, then nobody until the other client comes at six.
    assert np.diff(times[:60]) == pytest.approx(10.0, rel=0.02)
    assert who.tolist() == [0] * 60 + [1] * 10
    assert 21600 <= times[60] <= times[-1] < 22200
    later, _ = servegen.arrivals(np.random.default_rng(0), clients, 5, 86400.0)
    assert later.min() >= 86400


def test_the_mean_gap_is_that_of_the_rate():
    for pattern, shape in (("Weibull", 0.5), ("Gamma", 0.2)):
        gaps = Gaps(4.0, pattern, shape).sample(np.random.default_rng(1), 200_000)
        assert gaps.mean() == pytest.approx(0.25, rel=0.03)


def test_requests_of_the_data_have_the_lengths_of_their_client_and_window(data, tmp_path):
    archive = tmp_path / "r1.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(data, "deepseek-r1")
    for path in (data, archive):
        items = build(Recipe(source="servegen-r1", path=path, requests=70, speedup=2.0))
        assert {item.prompt_tokens for item in items[:60]} == {10, 20}
        assert set(outputs(items[:60])) == {100}
        assert {item.prompt_tokens for item in items[60:]} == {777}
        assert items[0].arrival_s == 0
        assert items[1].arrival_s == pytest.approx(5.0, rel=0.02)
    begun = build(Recipe(source="servegen-r1", path=data, requests=5, start_s=21600.0))
    assert {item.prompt_tokens for item in begun} == {777}
    poisson = build(Recipe(source="servegen-r1", path=data, requests=5, arrivals="poisson"))
    assert {item.prompt_tokens for item in poisson} <= {10, 20}


def test_bad_servegen_data_is_one_line(data, tmp_path, capsys):
    (data / "chunk-0-trace.csv").write_text("0,0,0,,0,0\n600,0.1,1,Pareto,1,1\n")
    assert servegen.main([str(data)]) == 2
    assert "chunk-0-trace.csv:2: pattern 'Pareto'" in capsys.readouterr().err
    (data / "chunk-0-trace.csv").unlink()
    with pytest.raises(WorkloadError, match="chunk 0 lacks its trace"):
        read(data)
    other = tmp_path / "other.tar"
    other.write_text("hello")
    with pytest.raises(WorkloadError, match=r"other\.tar: not a readable archive"):
        read(other)
    table = tmp_path / "table.json"
    table.write_text('{"clients": []}')
    with pytest.raises(WorkloadError, match="not a ServeGen table"):
        build(Recipe(source="servegen-r1", path=table))
