"""In the place of `sglang-kernel`, whose binary is built for one release of PyTorch.

What a Qwen2 model in bfloat16 calls of it, FlashInfer has too. Every other name, and every module
below this one, can be imported, and says so when it is called. Operators that the binary would
register with PyTorch are missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.4.10"
__path__ = []


class Missing:
    """Stands for a function, a class or a value; names below it are missing too."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = __name__

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self.__name__} is in sglang-kernel, which is not installed")

    def __getattr__(self, name: str) -> Missing:
        return _missing(self.__name__, name)


def _missing(owner: str, name: str) -> Missing:
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(f"{owner}.{name}")


def __getattr__(name: str) -> Missing:
    return _missing(__name__, name)


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module below this one, with nothing in it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: _missing(module.__name__, name)  # type: ignore[method-assign]


sys.meta_path.append(_Modules())


def rmsnorm(
    input: Any,
    weight: Any,
    eps: float = 1e-6,
    out: Any = None,
    enable_pdl: bool | None = None,
) -> Any:
    from flashinfer.norm import rmsnorm as kernel

    return kernel(input, weight, eps, out=out, enable_pdl=enable_pdl)


def fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    from flashinfer.norm import fused_add_rmsnorm as kernel

    kernel(input, residual, weight, eps, enable_pdl=enable_pdl)


def silu_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    from flashinfer.activation import silu_and_mul as kernel

    return kernel(input, out=out, enable_pdl=enable_pdl)


def top_k_renorm_prob(probs: Any, top_k: Any) -> Any:
    from flashinfer.sampling import top_k_renorm_probs as kernel

    return kernel(probs, top_k)


def top_p_renorm_prob(probs: Any, top_p: Any) -> Any:
    from flashinfer.sampling import top_p_renorm_probs as kernel

    return kernel(probs, top_p)
