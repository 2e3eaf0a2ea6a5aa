"""Builds the kernels that the check's servers want, all at once, before they ask one by one.

What fails here is built by the server that needs it. The caches are those of FlashInfer
(`FLASHINFER_WORKSPACE_BASE`) and SGLang (`~/.cache/sglang`); take them along for the next time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

# Of the models that are served: bytes of a token's keys in one layer, and of a head.
KEY_BYTES = (512, 1024)
HEAD_DIM = 128


def _attention(backend: str) -> Any:
    import torch
    from flashinfer.prefill import get_batch_prefill_module

    kept = (torch.bfloat16,) * 3
    plain = (0, False, False, False)  # No positions, window, cap or half precision sums.
    return get_batch_prefill_module(backend, *kept, torch.int32, HEAD_DIM, HEAD_DIM, *plain)


def _norm() -> Any:
    from flashinfer.jit.norm import gen_norm_module

    return gen_norm_module().build_and_load()


def _sampling() -> Any:
    from flashinfer.jit.sampling import gen_sampling_module

    return gen_sampling_module().build_and_load()


def _fused_norm() -> Any:
    import torch
    from sglang.kernels.ops.layernorm.norm import _jit_fused_add_rmsnorm_module

    return _jit_fused_add_rmsnorm_module(torch.bfloat16, False)


def _activation() -> Any:
    import torch
    from sglang.kernels.ops.activation.activation import activation_module

    return activation_module(torch.bfloat16)


def _store(key_bytes: int) -> Any:
    from sglang.kernels.ops.kvcache.kvcache import _jit_kvcache_module

    return _jit_kvcache_module(key_bytes, key_bytes, 0)


def _rope() -> Any:
    import torch
    from sglang.kernels.ops.attention.rope import _jit_fused_rope_module

    return _jit_fused_rope_module(True, HEAD_DIM, torch.bfloat16, torch.bfloat16)


def modules() -> dict[str, Callable[[], Any]]:
    """What builds each, by name; the longest first."""
    return {
        "attention fa3": lambda: _attention("fa3"),
        "attention fa2": lambda: _attention("fa2"),
        "sampling": _sampling,
        "norm": _norm,
        "fused norm": _fused_norm,
        "activation": _activation,
        "positions": _rope,
        **{f"store of {size} bytes": partial(_store, size) for size in KEY_BYTES},
    }


def build(some: dict[str, Callable[[], Any]]) -> list[str]:
    """Build all of them, each in a thread that waits for its compilers; returns those that
    failed."""
    began = time.monotonic()
    failed = []
    with ThreadPoolExecutor(len(some)) as pool:
        names = {pool.submit(make): name for name, make in some.items()}
        for done in as_completed(names):
            error = done.exception()
            if error is not None:
                failed.append(names[done])
            told = f": {type(error).__name__}: {str(error)[:300]}" if error else ""
            print(f"{time.monotonic() - began:6.1f} s  {names[done]}{told}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(1 if build(modules()) else 0)
