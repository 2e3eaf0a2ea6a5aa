"""What copies, pinned memory and streams do on this device, without a server.

`python -m evals.gpu.probe --device cuda` writes a line of JSON per finding: `holds` of what has to
be so, `value` of what is measured. On CUDA a step is late: it begins to write when everything that
should come after it has been launched. On a CPU there are no streams; the same calls run in order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.engine.kv import decode_batch
from pascal_sglang.engine.kv.copy_stream import copy_stream_of
from pascal_sglang.engine.kv.host_copies import EntryCopies
from pascal_sglang.engine.kv.pinning import pin

# Cycles of the GPU's clock: some 50 ms.
LATE_CYCLES = 100_000_000
# Layers, tokens of the pool, tokens of a copy and GiB to pin; on CUDA as Qwen2.5-7B has them.
SIZES = {"cuda": (28, 32768, 1000, 2.0), "cpu": (4, 4096, 500, 0.0)}
HEADS, HEAD_DIM = 4, 128
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """holds: whether what has to be so is so; None for what is only measured. value: a figure, or
    why something does not hold."""

    name: str
    holds: bool | None
    value: float | str | None = None


class Device:
    """Streams as a scheduler has them, and steps that are late."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        cuda = kind == "cuda"
        self.forward = torch.cuda.Stream() if cuda else None
        rows = SimpleNamespace(req_to_token=torch.zeros(8, 1))
        self.future_map = FutureMap(
            torch.device(kind), SpeculativeAlgorithm.NONE, rows, needs_cpu_seq_lens=False
        )
        self.scheduler: Any = SimpleNamespace(
            device=kind,
            enable_overlap=cuda,
            forward_stream=self.forward,
            schedule_stream=torch.cuda.current_stream() if cuda else None,
            forward_stream_ctx=self.in_forward(),
            future_map=self.future_map,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )

    def in_forward(self) -> contextlib.AbstractContextManager[Any]:
        if self.forward is None:
            return contextlib.nullcontext()
        stream: contextlib.AbstractContextManager[Any] = torch.cuda.stream(self.forward)
        return stream

    def late_step(self, write: Callable[[], Any]) -> None:
        """Launch a step that writes at its end, as a captured graph does."""
        if self.forward is None:
            write()
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.cuda._sleep(LATE_CYCLES)
            write()
        with self.in_forward():
            graph.replay()
        self._graph = graph  # Until it has run.

    def late(self) -> None:
        """Make this thread's own stream late."""
        if self.forward is not None:
            torch.cuda._sleep(LATE_CYCLES)

    def finish(self) -> None:
        if self.forward is not None:
            torch.cuda.synchronize()


def findings(kind: str) -> Iterator[Finding]:
    layers, entries, tokens, pinned_gib = SIZES[kind]
    device = Device(kind)
    if kind == "cuda":
        yield from _pinning(pinned_gib)
    shape = (entries, HEADS, HEAD_DIM)
    buffers = [torch.zeros(shape, dtype=torch.bfloat16, device=kind) for _ in range(2 * layers)]
    copies = EntryCopies(buffers, copy_stream_of(device.scheduler), pins=kind == "cuda")
    copies.reserve(4 * tokens)
    for check in (_rates, _sees_what_was_written, _comes_after_a_late_step, _holds_steps):
        yield from check(device, copies, tokens)
    yield from _stash_order(device)


def _pinning(gib: float) -> Iterator[Finding]:
    block = torch.zeros(int(gib * 2**30), dtype=torch.uint8)
    at, size = block.data_ptr(), block.nbytes
    began = time.perf_counter()
    error = pin(at, size)
    took = time.perf_counter() - began
    yield Finding("memory can be pinned", error == 0, f"CUDA error {error}" if error else None)
    yield Finding("pinning, GiB/s", None, gib / took)
    for name, where in (("a second registration", at), ("a bad address", 8)):
        error = pin(where, size)
        try:
            # A kernel's launch tells of an error that was left behind.
            torch.ones(8, device="cuda").add_(1)
            torch.cuda.synchronize()
            told = ""
        except RuntimeError as failed:
            told = str(failed).splitlines()[0]
        name = f"{name} is refused, and the next kernel does not hear of it"
        yield Finding(name, error != 0 and not told, told or None)


def _fill(copies: EntryCopies, locations: torch.Tensor, value: int) -> None:
    for number, buffer in enumerate(copies.buffers or ()):
        buffer[locations] = (value + number) % 128


def _has(copies: EntryCopies, locations: torch.Tensor, value: int) -> bool:
    return all(
        bool((buffer[locations] == (value + number) % 128).all())
        for number, buffer in enumerate(copies.buffers or ())
    )


def _locations(device: Device, tokens: int, entries: int) -> torch.Tensor:
    """Scattered, as entries are after some hours."""
    chosen = torch.randperm(entries - 1, generator=torch.Generator().manual_seed(0))[:tokens] + 1
    return chosen.to(device.kind)


def _entries(copies: EntryCopies) -> int:
    return len((copies.buffers or [torch.empty(0)])[0])


def _rates(device: Device, copies: EntryCopies, tokens: int) -> Iterator[Finding]:
    many = _locations(device, tokens, _entries(copies))
    _fill(copies, many, 1)
    device.finish()
    best = {"out": float("inf"), "back": float("inf"), "launch": float("inf"), "one": float("inf")}
    for _ in range(REPEATS):
        began = time.perf_counter()
        kv = copies.to_host(many)
        launched = time.perf_counter()
        copies.wait(kv)
        there = time.perf_counter()
        copies.to_device(kv, many)
        copies.wait(kv)
        back = time.perf_counter()
        copies.free(kv)
        one = copies.to_host(many[:1])
        copies.wait(one)
        copies.free(one)
        took = {
            "out": there - began,
            "launch": launched - began,
            "back": back - there,
            "one": time.perf_counter() - back,
        }
        best = {name: min(best[name], seconds) for name, seconds in took.items()}
    size = tokens * copies.bytes_per_entry / 1e9
    yield Finding(f"{tokens} tokens to the host, ms", None, 1e3 * best["out"])
    yield Finding(f"{tokens} tokens to the host, GB/s", None, size / best["out"])
    yield Finding(f"{tokens} tokens to the device, GB/s", None, size / best["back"])
    yield Finding(f"launch of a copy of {tokens} tokens, us", None, 1e6 * best["launch"])
    yield Finding("one token to the host, us", None, 1e6 * best["one"])


def _sees_what_was_written(device: Device, copies: EntryCopies, tokens: int) -> Iterator[Finding]:
    there = _locations(device, tokens, _entries(copies))
    device.late()
    _fill(copies, there, 2)
    kv = copies.to_host(there)
    copies.wait(kv)
    same = all(
        bool((part[first:last] == (2 + number) % 128).all())
        for number, part in enumerate(kv.parts)
        for first, last in kv.places
    )
    copies.free(kv)
    yield Finding("a copy to the host has what was written before it", same)


def _comes_after_a_late_step(device: Device, copies: EntryCopies, tokens: int) -> Iterator[Finding]:
    there = _locations(device, tokens, _entries(copies))
    _fill(copies, there, 3)
    kv = copies.to_host(there)
    copies.wait(kv)
    device.late_step(lambda: [buffer.fill_(99) for buffer in copies.buffers or ()])
    copies.to_device(kv, there)
    copies.wait(kv)
    device.finish()
    copies.free(kv)
    yield Finding("a copy to the device comes after a late step", _has(copies, there, 3))


def _holds_steps(device: Device, copies: EntryCopies, tokens: int) -> Iterator[Finding]:
    there = _locations(device, tokens, _entries(copies))
    _fill(copies, there, 4)
    kv = copies.to_host(there)
    copies.wait(kv)
    _fill(copies, there, 5)
    device.late()  # The copy waits for it.
    copies.to_device(kv, there)
    copies.hold_steps(kv)
    with device.in_forward():
        last = (copies.buffers or [torch.empty(0)])[-1]
        read = last[there].clone()
    copies.wait(kv)
    device.finish()
    copies.free(kv)
    expected = (4 + len(copies.buffers or ()) - 1) % 128
    yield Finding("a step that was told to waits for a copy", bool((read == expected).all()))


def _stash_order(device: Device) -> Iterator[Finding]:
    """A request comes back in the row of one that a late step still writes for."""
    rows = torch.tensor([3], device=device.kind)
    tokens = device.future_map.output_tokens_buf
    old, ours = torch.full_like(rows, 11), torch.full_like(rows, 22)
    device.finish()
    device.late_step(lambda: tokens.index_copy_(0, rows, old))
    batch: Any = SimpleNamespace(req_pool_indices=rows, seq_lens=torch.ones_like(rows))
    decode_batch._relay(batch, {"bonus_tokens": ours}, device.scheduler)
    device.finish()
    yield Finding("a late step does not overwrite the next token of a row", int(tokens[3]) == 22)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    asked = parser.parse_args()
    with torch.inference_mode():
        for finding in findings(asked.device):
            print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main()
