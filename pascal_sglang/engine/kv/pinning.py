"""Host memory that a CUDA device reads and writes by itself."""

from __future__ import annotations

import ctypes
import math
import mmap
from functools import cache

import torch


def on_own_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor that shares no page with any other. CUDA pins whole pages and may refuse
    one twice, and `torch.empty` has several small tensors on one. Raises: RuntimeError if there is
    not enough."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    try:
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"no {size} bytes of host memory: {error}") from error
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)


def pin(at: int, size: int) -> int:
    """Pin `size` bytes at address `at`, as they are. Returns CUDA's error, 0 for none; it is not
    seen by any later call."""
    error = int(torch.cuda.cudart().cudaHostRegister(at, size, 0))
    if error:
        clear_error()
    return error


def unpin(at: int) -> None:
    """Undo `pin`, before the memory at that address is unmapped. No copy there is under way."""
    if int(torch.cuda.cudart().cudaHostUnregister(at)):
        clear_error()


def clear_error() -> None:
    """Have CUDA forget this thread's last error, which the next kernel launch would report as its
    own. PyTorch's own binding of the runtime has no call for that."""
    for runtime in _runtimes():
        runtime.cudaGetLastError()


@cache
def _runtimes() -> list[ctypes.CDLL]:
    """The CUDA runtimes loaded into this process; none if PyTorch brings its own inside."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {queue.split(maxsplit=5)[-1].strip() for queue in maps if "/libcudart" in queue}
        return [ctypes.CDLL(path) for path in sorted(paths)]
    except OSError:
        return []
