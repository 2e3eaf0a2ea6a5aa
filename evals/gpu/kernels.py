"""Builds the kernels that the check's servers want, all at once, before they ask one by one.

What fails here is built by the server that needs it. The caches are those of FlashInfer
(`FLASHINFER_WORKSPACE_BASE`) and SGLang (`~/.cache/sglang`); take them along for the next time.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

# Of the models that are served: bytes of a token's keys in one layer, and of a head.
KEY_BYTES = (512, 1024)
HEAD_DIM = 128


FLAGS_ENV = "FLASHINFER_EXTRA_CUDAFLAGS"


def find_headers() -> None:
    """Have FlashInfer's compiler find the headers of cuRAND, which its attention includes. A CUDA
    that has little more than a compiler lacks them; the packages that PyTorch needs have them."""
    spec = importlib.util.find_spec("nvidia")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        for header in sorted(Path(folder).glob("*/include/curand_kernel.h")):
            # Looked through last.
            os.environ[FLAGS_ENV] = (
                f"{os.environ.get(FLAGS_ENV, '')} -isystem {header.parent}".strip()
            )
            return


def _attention(backend: str) -> Any:
    import torch
    from flashinfer.jit.attention import modules

    makes = {
        "fa2": modules._gen_batch_prefill_primary_module,
        "fa3": modules.gen_batch_prefill_module,
    }
    kept = (torch.bfloat16,) * 3
    plain = (0, False, False, False)  # No positions, window, cap or half precision sums.
    return makes[backend](backend, *kept, torch.int32, HEAD_DIM, HEAD_DIM, *plain)


def _norm() -> Any:
    from flashinfer.jit.norm import gen_norm_module

    return gen_norm_module()


def _sampling() -> Any:
    from flashinfer.jit.sampling import gen_sampling_module

    return gen_sampling_module()


# FlashInfer's own by name, and what makes the specification that it builds each from.
SPECS: dict[str, Callable[[], Any]] = {
    "attention fa3": partial(_attention, "fa3"),
    "attention fa2": partial(_attention, "fa2"),
    "sampling": _sampling,
    "norm": _norm,
}


def _build_and_load(make: Callable[[], Any]) -> Any:
    return make().build_and_load()


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
    """What builds or loads each, by name; the longest first."""
    return {
        **{name: partial(_build_and_load, make) for name, make in SPECS.items()},
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
