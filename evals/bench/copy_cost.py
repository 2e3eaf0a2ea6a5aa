"""What copies of KV between a device and host memory cost: `python -m evals.bench.copy_cost`.

A pause copies a request's KV to the host, and its return copies it back. For pools of the shapes of
some models, with 1,000 tokens that lie scattered, the table has the time until a copy is complete,
each way, and the time that the scheduler's thread is held to begin it. On a CPU that is the same.
`--device cuda` uses the stream and the kernels that a server would use there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

TOKENS, ROUNDS = 1000, 20
# Requests whose copies begin together.
TOGETHER = 4


class Shape(NamedTuple):
    """The KV of a token: a K and a V buffer per layer."""

    name: str
    layers: int
    heads: int
    width: int
    # As torch calls it, and its bytes.
    dtype: str
    size: int


SHAPES = (
    Shape("tiny, float32", 2, 2, 32, "float32", 4),
    Shape("7B", 28, 4, 128, "bfloat16", 2),
    Shape("32B", 64, 8, 128, "bfloat16", 2),
    Shape("32B, a rank of 8", 64, 1, 128, "bfloat16", 2),
)


class Costs(NamedTuple):
    """Milliseconds per 1,000 tokens: until complete each way, and until begun."""

    out: float
    back: float
    begin_out: float
    begin_back: float


def stream_of(device: str) -> Any:
    """Where copies run on a server."""
    import torch

    from pascal_sglang.engine.kv.copy_stream import CopyStream, CudaCopyStream

    if device == "cpu":
        return CopyStream()
    scheduler: Any = SimpleNamespace(forward_stream=torch.cuda.Stream(), enable_overlap=True)
    return CudaCopyStream(scheduler)


def measure(shape: Shape, device: str, tokens: int = TOKENS, rounds: int = ROUNDS) -> Costs:
    """Medians of copies of several requests that begin together."""
    import torch

    from pascal_sglang.engine.kv.host_copies import EntryCopies

    entries = TOGETHER * tokens + 1
    row = (shape.heads, shape.width)
    buffers = [
        torch.zeros((entries, *row), dtype=getattr(torch, shape.dtype), device=device)
        for _ in range(2 * shape.layers)
    ]
    copies = EntryCopies(buffers, stream_of(device), pins=device != "cpu")
    copies.reserve(TOGETHER * tokens)
    # As SGLang's request rows have them.
    places = torch.randperm(entries - 1, dtype=torch.int32).to(device) + 1
    wheres = places.split(tokens)

    def wait(kept: list[Any]) -> bool:
        complete = [copies.wait(kv) for kv in kept]
        return all(complete)

    took: list[list[float]] = []
    for _ in range(rounds):
        began = time.perf_counter()
        with copies.together():
            kept = [copies.to_host(where) for where in wheres]
        begun = time.perf_counter()
        whole = wait(kept)
        out = time.perf_counter()
        with copies.together():
            for kv, where in zip(kept, wheres, strict=True):
                copies.to_device(kv, where)
        back_begun = time.perf_counter()
        whole = wait(kept) and whole
        back = time.perf_counter()
        if not whole:
            raise SystemExit("the device failed")
        for kv in kept:
            copies.free(kv)
        seconds = (out - began, back - out, begun - began, back_begun - out)
        took.append([1e6 * s / TOGETHER / tokens for s in seconds])
    return Costs(*(statistics.median(column) for column in zip(*took, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    columns = ("KiB a token", "out ms", "back ms", "begin out", "begin back")
    print(f"per {TOKENS} tokens, {TOGETHER} requests together, on {options.device}")
    print(f"{'pool':<20}" + "".join(f"{column:>13}" for column in columns))
    for shape in SHAPES:
        costs = measure(shape, options.device, rounds=options.rounds)
        size = 2 * shape.layers * shape.heads * shape.width * shape.size / 1024
        figures = "".join(f"{value:>13.2f}" for value in costs)
        print(f"{shape.name:<20}{size:>13.0f}{figures}", flush=True)


if __name__ == "__main__":
    main()
