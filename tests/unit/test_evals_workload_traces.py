"""Traces in the Mooncake and the Azure format, on small files made by hand."""

import gzip
import json

import numpy as np
import pytest

from evals.load.lines import WorkloadError
from evals.load.prompt import new_part
from evals.workload import Recipe, build, main

MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]},
    {"timestamp": 1000, "input_length": 1300, "output_length": 50, "hash_ids": [0, 1, 3]},
    {"timestamp": 4000, "input_length": 600, "output_length": 3},
]


def outputs(items):
    return [item.output_tokens for item in items]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mooncake_prompts_share_their_blocks(tmp_path):
    path = write(tmp_path / "trace.jsonl", MOONCAKE)
    items = build(Recipe(source="mooncake", path=path, speedup=2.0))
    assert [item.arrival_s for item in items] == [0.0, 0.0, 1.5]
    assert [item.prompt_tokens for item in items] == [1100, 1300, 600]
    assert outputs(items) == [500, 50, 3]
    a, b, c = (new_part(item, i, 0) for i, item in enumerate(items))
    assert [len(a), len(b), len(c)] == [1100, 1300, 600]
    assert a[:1024] == b[:1024]
    assert a[1024:] != b[1024:1100]
    assert c[:10] != a[:10]
    assert a[:512] != a[512:1024]
    other = build(Recipe(source="mooncake", path=path, seed=1))
    assert new_part(other[0], 0, 0) != a


def test_mooncake_blocks_shrink_with_the_prompts(tmp_path):
    path = write(tmp_path / "trace.jsonl", MOONCAKE)
    items = build(
        Recipe(source="mooncake", path=path, prompt_scale=0.125, rate=2.0, arrivals="gamma")
    )
    a, b = (new_part(item, i, 0) for i, item in enumerate(items[:2]))
    assert (len(a), len(b)) == (138, 162)
    assert a[:128] == b[:128]
    assert a[128:] != b[128:138]


def test_traces_can_start_late_and_stop_early(tmp_path):
    path = write(tmp_path / "trace.jsonl", MOONCAKE)
    assert len(build(Recipe(source="mooncake", path=path, requests=2))) == 2
    late = build(Recipe(source="mooncake", path=path, start_s=1.0))
    assert [(item.arrival_s, item.prompt_tokens) for item in late] == [(0.0, 600)]
    with pytest.raises(WorkloadError, match="nothing in it from 9 s on"):
        build(Recipe(source="mooncake", path=path, start_s=9.0))
    with pytest.raises(WorkloadError, match="its own rate"):
        build(Recipe(source="mooncake", path=path, rate=2.0))


def test_a_large_trace_is_not_read_to_its_end(tmp_path):
    path = write(tmp_path / "trace.jsonl", MOONCAKE)
    path.write_text(path.read_text() + "not read\n")
    assert len(build(Recipe(source="mooncake", path=path, requests=3))) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"timestamp": "x", "input_length": 1, "output_length": 1}', "timestamp must be"),
        ('{"timestamp": 1, "output_length": 1}', "input_length must be a whole number"),
        ('{"timestamp": 1, "input_length": 1, "output_length": -1}', "output_length must be"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}', "hash_ids"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path, line, said, capsys):
    path = write(tmp_path / "trace.jsonl", MOONCAKE[:1])
    path.write_text(path.read_text() + "\n" + line + "\n")
    assert main(["mooncake", "--path", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evals: error: ")
    assert f"trace.jsonl:3: {said}" in error
    assert error.count("\n") == 1


AZURE_CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109\r
2023-11-16 18:15:51.2225670,879,55
"""


def test_azure_csv_and_jsonl_are_alike(tmp_path):
    table = tmp_path / "azure.csv"
    table.write_text(AZURE_CSV)
    items = build(Recipe(source="azure", path=table))
    assert [item.arrival_s for item in items] == pytest.approx([0.0, 4.314579, 4.541977], abs=1e-5)
    assert [item.prompt_tokens for item in items] == [374, 396, 879]
    assert outputs(items) == [44, 109, 55]
    names, *rows = (line.split(",") for line in AZURE_CSV.splitlines() if line)
    lines = write(tmp_path / "azure.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    assert build(Recipe(source="azure", path=lines)) == items
    packed = tmp_path / "azure.csv.gz"
    packed.write_bytes(gzip.compress(AZURE_CSV.encode()))
    assert build(Recipe(source="azure", path=packed)) == items


def test_azure_times_may_have_a_zone(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 02:00:01.009930+02:00,2399,6\n"
    )
    assert [i.arrival_s for i in build(Recipe(source="azure", path=path))] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AZURE_CSV + "yesterday,1,1\n", r"azure.csv:5: TIMESTAMP must be an ISO time, not 'yester"),
        (
            AZURE_CSV + "2023-11-16 18:15:59,7\n",
            r"azure.csv:5: GeneratedTokens must be .* not None",
        ),
        (AZURE_CSV + "2023-11-16 18:15:59,x,7\n", r"azure.csv:5: ContextTokens must be .* not 'x'"),
        ("TIMESTAMP,Tokens\n", r"azure.csv:1: the header lacks ContextTokens, GeneratedTokens"),
        ("", r"azure.csv: no requests in it"),
    ],
)
def test_bad_azure_traces_are_named(tmp_path, text, said):
    path = tmp_path / "azure.csv"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=said):
        build(Recipe(source="azure", path=path))


def test_thinking_shares_of_traces_are_drawn_and_seeded(tmp_path):
    rows = [{"timestamp": i, "input_length": 9, "output_length": 10_000} for i in range(3000)]
    path = write(tmp_path / "trace.jsonl", rows)
    shares = [
        [
            i.thinking_tokens
            for i in build(Recipe(source="mooncake", path=path, requests=3000, seed=s))
        ]
        for s in (0, 0, 1)
    ]
    assert shares[0] == shares[1] != shares[2]
    assert np.median(shares[0]) == pytest.approx(7600, abs=300)
