"""KV entries as plain bytes, for the pools whose layout we know: plain MHA and MLA, and those with
another pool for sliding windows beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from sglang.srt.runtime_context import get_parallel, get_serving

from pascal_sglang.engine.kv.drafts import layout_name
from pascal_sglang.engine.kv.host_copies import EntryCopies, HostCopies, HostCopy
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.transfers import Parts
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


class KVSerializer:
    """Reads and writes KV entries of one rank's pool, in pieces of some tokens. Behind them stand
    the entries of the pool for sliding windows, of those tokens that a window still sees, and
    behind the last piece the request's recurrent state.

    per_token: bytes of a token in both pools. state_bytes: those of a state; 0 without.
    """

    def __init__(self, copies: HostCopies, model: str, weights: Callable[[], str]) -> None:
        """weights: the version of the model's weights, which may change."""
        self.copies = copies
        self._pools: list[EntryCopies] = [copies]
        if copies.windows is not None:
            self._pools.append(copies.windows)
        self.per_token: int = sum(pool.bytes_per_entry for pool in self._pools)
        self.state_bytes = 0 if copies.states is None else aligned(copies.states.bytes_per_entry)
        formats = []
        for pool in (copies, copies.windows, copies.states):
            buffers = [] if pool is None else pool.buffers or []
            shapes = sorted({f"{b.dtype}{tuple(b.shape[1:])}" for b in buffers})
            formats.append(f"{len(buffers)}x{'+'.join(shapes)}")
        ranks = get_parallel().attn_tp_size
        self._weights = weights
        self._layout = f"{' '.join(formats)} tp{ranks} {model}"

    @property
    def layout(self) -> str:
        """A name for what the bytes mean now: equal names, equal bytes for equal tokens."""
        return f"{self._layout} weights {self._weights()}"[-1000:]

    def size(self, tokens: int, before: int, *, state: bool = False) -> int:
        """Bytes of a piece of `tokens`, the first `before` of which have no entries of windows.
        state: with a recurrent state, if there are any."""
        counts = self._counts(tokens, before)
        both = zip(self._pools, counts, strict=True)
        size = sum(count * pool.bytes_per_entry for pool, count in both)
        return aligned(size) + self.state_bytes if state and self.state_bytes else size

    def window_bytes(self, tokens: int) -> int:
        """Bytes of memory that takes pieces of up to so many tokens, before others like it."""
        return aligned(self.size(tokens, 0))

    def copy_out(
        self, locations: torch.Tensor, before: int, memory: memoryview, parts: Parts
    ) -> None:
        """Begin to write a piece, whose KV is at `locations`, shape (tokens,), to `memory`; it is
        there when `wait` returns. What has begun is added to `parts`, whatever fails after it."""
        for pool, where, kv in self._entries(locations, before, memory):
            parts.append((pool, kv))
            pool.read(where, kv)

    def copy_host(
        self, copy: HostCopy, begin: int, end: int, before: int, memory: memoryview
    ) -> None:
        """Write the piece of the tokens `begin`..`end` of a complete copy in host memory."""
        tokens = end - begin
        halves = [(copy.halves(), begin, end)]
        if len(self._pools) > 1:
            first = min(begin + before, end) - copy.before
            halves.append((copy.window_halves(), first, end - copy.before))
        in_slot = self._blocks(memory, tokens, before)
        for (kept, first, last), blocks in zip(halves, in_slot, strict=True):
            _gather(kept, first, last, blocks)

    def copy_in(
        self, locations: torch.Tensor, before: int, memory: memoryview, parts: Parts
    ) -> None:
        """Begin the reverse of `copy_out`; `memory` is read until `wait` returns."""
        for pool, where, kv in self._entries(locations, before, memory):
            parts.append((pool, kv))
            pool.to_device(kv, where)

    def state_out(self, location: torch.Tensor, memory: memoryview, parts: Parts) -> None:
        """Begin to write the recurrent state at `location`, shape (1,), to the end of `memory`, as
        `copy_out` does."""
        states, kv = self.copies.states, self._in_slot(self._state(memory))
        assert states is not None
        parts.append((states, kv))
        states.read(location, kv)

    def state_host(self, state: HostKV, memory: memoryview) -> None:
        """Write a state that is complete in host memory to the end of `memory`."""
        _gather([state], 0, 1, self._state(memory))

    def state_in(self, location: torch.Tensor, memory: memoryview, parts: Parts) -> None:
        """Begin the reverse of `state_out`."""
        states, kv = self.copies.states, self._in_slot(self._state(memory))
        assert states is not None
        parts.append((states, kv))
        states.to_device(kv, location)

    def _in_slot(self, blocks: list[torch.Tensor]) -> HostKV:
        return HostKV(blocks, pinned=self.copies.slots_pinned)

    def _state(self, memory: memoryview) -> list[torch.Tensor]:
        """Where at the end of `memory` what of each buffer of states is."""
        assert self.copies.states is not None
        at = len(memory) - self.state_bytes
        return _blocks(self.copies.states, memory, 1, at)

    @staticmethod
    def wait(parts: Parts) -> bool:
        """Until all of it is complete; False if the device failed."""
        complete = [pool.wait(kv) for pool, kv in parts]
        return all(complete)

    @staticmethod
    def hold_steps(parts: Parts) -> None:
        """Have steps launched from now on wait for it."""
        for pool, kv in parts:
            pool.hold_steps(kv)

    def _counts(self, tokens: int, before: int) -> Iterator[int]:
        """Entries of a piece in each pool."""
        yield tokens
        if len(self._pools) > 1:
            yield max(0, tokens - before)

    def _entries(
        self, locations: torch.Tensor, before: int, memory: memoryview
    ) -> list[tuple[EntryCopies, torch.Tensor, HostKV]]:
        """The entries of a piece in each pool that has some: where they are there, and in
        `memory`. All is known before any is copied: what fails here leaves nothing under way."""
        blocks = [self._in_slot(each) for each in self._blocks(memory, len(locations), before)]
        found = [(self._pools[0], locations, blocks[0])]
        for pool, kv in zip(self._pools[1:], blocks[1:], strict=True):
            if before < len(locations):
                found.append((pool, self.copies.window_peers(locations[before:]), kv))
        return found

    def _blocks(self, memory: memoryview, tokens: int, before: int) -> Iterator[list[torch.Tensor]]:
        """For each pool, where in `memory` what of each of its buffers is."""
        at = 0
        counts = self._counts(tokens, before)
        for pool, entries in zip(self._pools, counts, strict=True):
            yield _blocks(pool, memory, entries, at)
            at += entries * pool.bytes_per_entry


def _blocks(pool: EntryCopies, memory: memoryview, entries: int, at: int) -> list[torch.Tensor]:
    """Where in `memory`, from the byte `at` on, what of each of a pool's buffers is."""
    blocks = []
    for buffer in pool.buffers or []:
        count = entries * buffer[0].numel()
        if count:
            block = torch.frombuffer(memory, dtype=buffer.dtype, count=count, offset=at)
        else:
            block = torch.empty(0, dtype=buffer.dtype)
        blocks.append(block.view(entries, *buffer.shape[1:]))
        at += count * buffer.element_size()
    return blocks


def aligned(size: int) -> int:
    """Up to where the next thing in memory may begin, whatever it is."""
    return size + -size % 16


def _gather(halves: Sequence[HostKV], begin: int, end: int, blocks: Sequence[torch.Tensor]) -> None:
    """Write the entries `begin`..`end` of what stands in `halves` one after the other."""
    before = 0
    for half in halves:
        for at, first, last in half.runs(max(1, end)):
            here = before + at
            begins, ends = max(begin, here), min(end, here + last - first)
            if begins < ends:
                for part, block in zip(half.parts, blocks, strict=True):
                    found = part[first + begins - here : first + ends - here]
                    block[begins - begin : ends - begin] = found
        before += half.tokens


def kv_bytes_of(scheduler: SchedulerProtocol, copies: HostCopies) -> KVSerializer | str:
    """Access to the scheduler's pool, or why its KV cannot travel."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if copies.buffers is None:
        return f"KV in a {type(pool).__name__} of this layout does not travel yet"
    if scheduler.server_args.enable_hierarchical_cache:
        return "a prefix in the host pool of the hierarchical cache does not travel yet"
    model = str(scheduler.server_args.model_path) + layout_name(scheduler)
    return KVSerializer(copies, model, lambda: str(get_serving().weight_version))
