"""Reference CPU platform: the unmodified engine on any laptop and in CI, in plain PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from pascal_sglang.older_sglang import install


class ReferenceCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Serves on a CPU without SGLang's AMX kernels.

    SGLang's in-tree CPU path needs a CPU build of `sgl_kernel`; the published wheel is the CUDA
    one. As an out-of-tree platform every kernel choice falls back to torch-native code.
    Slow, exact (float32), meant for demos, tests and policy work.
    """

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def init_backend(self) -> None:
        """Attention is ours by the names that models ask for: SGLang's PyTorch backend leaves out
        what they need, and Triton's kernels do not run here.

        SGLang calls this before it imports its models, which bind the kernels of recurrent layers.
        """
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        from pascal_sglang.platforms import dp_attention, host_cache, recurrent, token_masks

        importlib.import_module("sglang.kernels.ops.attention.linear")
        install()  # For what was imported since the platform was chosen.
        dp_attention.install()
        for name in ("torch_native", "triton"):
            ATTENTION_BACKENDS[name] = _reference_attention
        recurrent.install()
        host_cache.install()
        token_masks.install()

    def support_mamba_cache_extra_buffer(self) -> bool:
        return True

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Exact arithmetic, torch-native sampling, and no busy loop while idle.

        A spinning rank starves its neighbours on a machine of few cores.
        """
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        if server_args.dtype == "float32" and not envs.SGLANG_MAMBA_CONV_DTYPE.is_set():
            # SGLang keeps the last inputs of a convolution as bfloat16 otherwise: a decode step
            # would not give what a prefill of the same tokens gives.
            envs.SGLANG_MAMBA_CONV_DTYPE.set("float32")
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        server_args.sleep_on_idle = True

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        from pascal_sglang.platforms import speculative

        speculative.keep_overlap()
        return algorithm in speculative.ALGORITHMS

    def get_speculative_worker_cls(self, algorithm: str) -> None:
        """SGLang's own worker, once what it calls runs here. SGLang asks before it builds one."""
        from pascal_sglang.platforms import speculative

        speculative.install()

    def get_speculative_cache_locs_fn(self) -> Callable[..., Any]:
        from pascal_sglang.platforms.speculative import read_rows

        return read_rows


def _reference_attention(runner: Any) -> Any:
    # SGLang's model runner asks for the platform while it is imported.
    from pascal_sglang.platforms.attention import create

    return create(runner)
