"""Memory that cannot be pinned makes copies slower; it fails no kernel that is launched later."""

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
