"""Entries between a device's pool and host memory, of all layers by one launch.

PyTorch gathers the entries of one layer on the device, and copies them from there: two launches a
layer, each of which costs the scheduler's thread more than the device. A kernel that reads and
writes pinned host memory by itself does all layers that have entries of one size at once. SGLang
has one for its hierarchical cache; where that does not load, one in Triton stands in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch

from pascal_sglang.engine.kv.host_kv import HostKV

logger = logging.getLogger(__name__)

# Entries are copied in words of so many bytes.
WORD = 8
# Entries that a kernel has to copy as PyTorch does before it is used.
PROBED = 3

# As `sgl_kernel.kvcacheio.transfer_kv_all_layer_mla`: addresses of the buffers to read and of those
# to write, places of the entries in them, bytes of an entry, number of buffers.
Launch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int], None]


class EntryKernel:
    """Copies entries of a pool's `buffers`, each of shape (entries, ...).

    memory: host memory that the device reads and writes, a tensor per buffer; other memory may be
    used, too.
    """

    def __init__(
        self, launch: Launch, buffers: Sequence[torch.Tensor], memory: list[torch.Tensor]
    ) -> None:
        self._launch = launch
        self._device = buffers[0].device
        self._groups: dict[int, list[int]] = {}  # Numbers of the buffers by bytes of an entry.
        for number, buffer in enumerate(buffers):
            self._groups.setdefault(buffer[0].nbytes, []).append(number)
        self._pool = self._addresses(buffers)
        self._own, self._memory = memory, self._addresses(memory)

    def takes(self, kv: HostKV) -> bool:
        """Whether the device can copy to or from there by itself."""
        if kv.parts is self._own:
            return True
        return kv.pinned and all(part.data_ptr() % WORD == 0 for part in kv.parts)

    def copy_out(self, kv: HostKV, locations: torch.Tensor) -> None:
        """Begin to copy the entries at `locations`, int64 on the device, to host memory."""
        there, places = self._host(kv)
        for size, here in self._pool.items():
            number = len(self._groups[size])
            self._launch(here, there[size], locations, places, size, number)

    def copy_in(self, kv: HostKV, locations: torch.Tensor) -> None:
        """The reverse."""
        there, places = self._host(kv)
        for size, here in self._pool.items():
            number = len(self._groups[size])
            self._launch(there[size], here, places, locations, size, number)

    def _host(self, kv: HostKV) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Addresses of the memory, and the places of the entries in it."""
        addresses = self._memory if kv.parts is self._own else self._addresses(kv.parts)
        places = [torch.arange(*run, dtype=torch.int64, device=self._device) for run in kv.places]
        return addresses, places[0] if len(places) == 1 else torch.cat(places)

    def _addresses(self, tensors: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """On the device, by bytes of an entry."""
        found = {}
        for size, numbers in self._groups.items():
            table = torch.tensor([tensors[n].data_ptr() for n in numbers], dtype=torch.int64)
            if self._device.type != "cpu":
                table = table.pin_memory().to(self._device, non_blocking=True)
            found[size] = table.view(torch.uint64)
        return found


def can_copy(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether entries of these buffers are whole words one behind the other."""
    return all(
        t.is_contiguous() and t.nbytes and t[0].nbytes % WORD == 0 and t.data_ptr() % WORD == 0
        for t in tensors
    )


def kernel_for(buffers: Sequence[torch.Tensor], memory: list[torch.Tensor]) -> EntryKernel | None:
    """The first kernel that loads and copies between these as it should; None without one. Nobody
    may use the pool yet; it is left as it was."""
    if not can_copy(buffers) or not can_copy(memory):
        return None
    count = min(PROBED, len(buffers[0]), len(memory[0]))
    for name, launch in launches():
        try:
            kernel = EntryKernel(launch, buffers, memory)
            if _copies(kernel, buffers, memory, count):
                logger.info("pascal_sglang: %s copies KV between device and host", name)
                return kernel
            logger.warning("pascal_sglang: %s does not copy KV as it should", name)
        except Exception as error:  # Whatever it is that a kernel of others lacks here.
            logger.warning("pascal_sglang: %s does not run here: %s", name, error)
    return None


def launches() -> Iterator[tuple[str, Launch]]:
    """The kernels that load, best first, each with its name."""
    with suppress(Exception):
        from sgl_kernel.kvcacheio import transfer_kv_all_layer_mla

        yield "sgl_kernel", transfer_kv_all_layer_mla
    with suppress(Exception):
        from pascal_sglang.engine.kv.triton_copy import copy_entries

        yield "Triton", copy_entries


def _copies(
    kernel: EntryKernel,
    buffers: Sequence[torch.Tensor],
    memory: list[torch.Tensor],
    count: int,
) -> bool:
    """Whether the kernel copies `count` entries there and back as PyTorch does."""
    device = buffers[0].device
    locations = torch.arange(count - 1, -1, -1, dtype=torch.int64, device=device)
    kv = HostKV(memory, ranges=[(0, count)])
    before = [buffer[:count].clone() for buffer in buffers]
    held = [part[:count].clone() for part in memory]
    kernel.copy_out(kv, locations)
    _wait(device)
    out = all(
        torch.equal(_bytes(part[:count]), _bytes(was.flip(0)))
        for part, was in zip(memory, before, strict=True)
    )
    kv.parts = list(memory)
    for part in memory:
        _bytes(part[:count]).bitwise_not_()
    kernel.copy_in(kv, locations)
    _wait(device)
    back = all(
        torch.equal(_bytes(buffer[:count]), ~_bytes(was))
        for buffer, was in zip(buffers, before, strict=True)
    )
    for buffer, part, was, old in zip(buffers, memory, before, held, strict=True):
        buffer[:count], part[:count] = was, old
    return out and back


def _bytes(entries: torch.Tensor) -> torch.Tensor:
    """In host memory. What is compared may be no numbers."""
    return entries.cpu().view(torch.uint8)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
