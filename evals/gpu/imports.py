"""Imports all that servers import, as on a Hopper GPU, which need not be there.

`PYTHONPATH=CHECKOUT:SITE python -m evals.gpu.imports`, with a Python and packages like the other
machine's: what the kit lacks is found here, not there. Answers to queries of the device are made
up; whatever goes on to use it fails.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from types import SimpleNamespace
from typing import Any

import torch

MODULES = """
sglang.launch_server sglang.srt.entrypoints.http_server sglang.srt.entrypoints.engine
sglang.srt.managers.scheduler sglang.srt.managers.detokenizer_manager
sglang.srt.managers.data_parallel_controller sglang.srt.managers.tokenizer_manager
sglang.srt.model_executor.model_runner sglang.srt.models.qwen2
sglang.srt.layers.attention.flashinfer_backend sglang.srt.layers.attention.triton_backend
sglang.srt.batch_invariant_ops sglang.srt.sampling.custom_logit_processor
flashinfer.prefill flashinfer.decode flashinfer.norm flashinfer.sampling
pascal_sglang.launch_server pascal_sglang.plugin pascal_sglang.engine.scheduler
pascal_sglang.engine.build pascal_sglang.engine.migration.build
pascal_sglang.cluster.controller pascal_sglang.entrypoints.http_server
pascal_sglang.entrypoints.detokenizer pascal_sglang.demo.budget pascal_sglang.demo.tiny
evals.gpu.check evals.gpu.probe evals.gpu.kernels
"""
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    L2_cache_size=50 * 2**20,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    uuid="0",
)


def fake_cuda() -> None:
    """Have PyTorch tell of one GPU of compute capability 9.0."""
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": PROPERTIES.name,
        "get_device_properties": PROPERTIES,
        "mem_get_info": (PROPERTIES.total_memory, PROPERTIES.total_memory),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)


def failed() -> list[str]:
    """Modules that cannot be imported; their tracebacks are printed."""
    found = []
    for name in MODULES.split():
        try:
            importlib.import_module(name)
        except Exception:
            traceback.print_exc()
            found.append(name)
    return found


def main() -> int:
    fake_cuda()
    wrong = failed()
    shown = ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in VERSIONS)
    print(f"Python {sys.version.split()[0]}, {shown}, CUDA {torch.version.cuda}")
    print(f"{len(MODULES.split()) - len(wrong)} of {len(MODULES.split())} imported", *wrong)
    return bool(wrong)


VERSIONS = ("torch", "triton", "transformers", "sglang", "flashinfer", "sgl_kernel")

if __name__ == "__main__":
    sys.exit(main())
