"""Memory that cannot be pinned makes copies slower; it fails no kernel that is launched later."""

import mmap

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from pascal_sglang.engine.kv import pinning
from tests.unit.test_host_copies import copies_of, pool_of


class Runtime:
    """CUDA's runtime: an error stays until somebody asks for it."""

    REFUSED = 712
    latched = 0

    def cudaHostRegister(self, at, size, flags):
        self.latched = self.REFUSED
        return self.REFUSED

    def cudaGetLastError(self):
        last, self.latched = self.latched, 0
        return last


def test_a_failure_is_told_once_and_not_to_the_next_kernel(monkeypatch, caplog):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinning, "_runtimes", lambda: [runtime])
    copies, _ = copies_of(pool_of(MHATokenToKVPool))
    copies._pins = True
    for _ in range(2):
        copies.pin(memoryview(bytearray(64)))
        assert runtime.latched == 0
    assert caplog.text.count("cannot pin 64 bytes") == 1
    assert "712" in caplog.text


def test_without_a_runtime_to_ask_the_failure_is_told_all_the_same(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(pinning, "_runtimes", list)
    assert pinning.pin(4096, 64) == Runtime.REFUSED


def test_every_runtime_that_is_loaded_can_be_asked():
    for runtime in pinning._runtimes():
        assert runtime.cudaGetLastError() >= 0
    pinning.clear_error()


def test_blocks_share_no_page_whatever_their_size():
    copies, _ = copies_of(pool_of(MHATokenToKVPool, torch.bfloat16), room=5)
    ranges = [(b.data_ptr(), b.data_ptr() + b.nbytes - 1) for b in copies._memory]
    pages = [
        page for begin, end in ranges for page in {begin // mmap.PAGESIZE, end // mmap.PAGESIZE}
    ]
    assert len(copies._memory) > 2
    assert len(pages) == len(set(pages))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_a_block_is_a_tensor_like_any_other(dtype):
    block = pinning.on_own_pages((7, 3, 5), dtype)
    assert (block.shape, block.dtype) == (torch.Size([7, 3, 5]), dtype)
    block.copy_(torch.ones(7, 3, 5))
    assert block.float().sum() == 105
    assert pinning.on_own_pages((0, 5), dtype).shape == (0, 5)


def test_memory_that_is_not_there_is_told():
    with pytest.raises(RuntimeError, match="bytes of host memory"):
        pinning.on_own_pages((1 << 60,), torch.uint8)
