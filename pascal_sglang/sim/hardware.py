"""Costs derived from models and devices, where nothing has been measured.

Decode is bound by memory traffic: every step reads the weights once (of all experts, for a full
batch reaches nearly all of them) and all KV of those who run.
Prefill is bound by arithmetic: two operations per active parameter and token. The efficiencies are
assumptions of ours in the range that vLLM and SGLang reach (0.8 of the bandwidth, 0.5 of the dense
bf16 peak); so are the overheads, taken from the 5-10 ms per pass of vLLM 0.6 and the 1-2 ms of
current SGLang with overlap scheduling.

KV reads are assumed to reach as much of the bandwidth as weights do, which is optimistic. Of the
3.35 TB/s of an H100 SXM, these were published: 42 % for reads of a paged KV cache, beside 78 % for
weights (Nsight Compute, 70B, https://mikamirai.com/blog/gpu-memory-bandwidth/); 47 % for
FlashAttention 2 with pages and 8 queries per KV head, 64 requests of 256 tokens
(https://github.com/microsoft/onnxruntime/pull/21414); 54 and 55 % for FlashAttention 3 with pages,
16 requests of 2,000 and 4,000 tokens (https://github.com/Dao-AILab/flash-attention/issues/1572).
`Engine.kv_read_share` sets it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pascal_sglang.sim.cost import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """parameters, active: in all, and those a token passes through. layers, kv_heads, head_dim: of
    the KV cache. weight_bytes, kv_bytes: per number."""

    parameters: float
    active: float
    layers: int
    kv_heads: int
    head_dim: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0

    @property
    def kv_token_bytes(self) -> float:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Peak figures of one GPU: memory in bytes and bytes per second, dense bf16 operations per
    second, PCIe in bytes per second and direction. host_bytes: host memory for paused KV."""

    memory: float
    bandwidth: float
    operations: float
    pcie: float
    host_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """pass_s, request_s: what scheduling, launches and sampling take per pass and per request.
    bandwidth_share: of the memory's bandwidth that reads of weights reach; kv_read_share: those of
    KV. launch_layer_s: host time per layer to launch a copy of paused KV.
    memory_share: of the device that weights and KV may fill. activations: bytes kept free beside
    them. network: bytes per second between instances."""

    pass_s: float
    request_s: float
    memory_share: float = 0.9
    activations: float = 2e9
    bandwidth_share: float = 0.8
    kv_read_share: float = 0.8
    operations_share: float = 0.5
    pcie_share: float = 0.8
    network: float = 12.5e9
    network_share: float = 0.9
    message_s: float = 200e-6
    # Our copies of paused KV, measured: 1.5 ms at 28 layers, 3.5 ms at 64.
    launch_layer_s: float = 54e-6


# The paper's: DeepSeek-R1-Distill-Qwen-32B, 256 KiB of KV per token.
R1_QWEN_32B = Model(parameters=32.8e9, active=32.8e9, layers=64, kv_heads=8, head_dim=128)
# Model cards of Qwen3: 8.2e9 parameters; 30.5e9 of which 3.3e9 are active.
QWEN3_8B = Model(parameters=8.2e9, active=8.2e9, layers=36, kv_heads=8, head_dim=128)
QWEN3_30B_A3B = Model(parameters=30.5e9, active=3.3e9, layers=48, kv_heads=4, head_dim=128)

# Data sheets of NVIDIA: H100 SXM (HBM3, here with 96 GB) and H200.
H100_96 = Device(memory=96e9, bandwidth=3.35e12, operations=989e12, pcie=64e9, host_bytes=256e9)
H100_80 = Device(memory=80e9, bandwidth=3.35e12, operations=989e12, pcie=64e9, host_bytes=256e9)
H200 = Device(memory=141e9, bandwidth=4.8e12, operations=989e12, pcie=64e9, host_bytes=256e9)

VLLM_06 = Engine(pass_s=6e-3, request_s=20e-6)
SGLANG_05 = Engine(pass_s=1.5e-3, request_s=6e-6)


def derive(model: Model, device: Device, engine: Engine) -> Cost:
    """Costs of one instance on one device, whose copies run beside the decoding."""
    weights_s = model.parameters * model.weight_bytes / (device.bandwidth * engine.bandwidth_share)
    kv = model.kv_token_bytes
    room = device.memory * engine.memory_share - engine.activations
    capacity = int((room - model.parameters * model.weight_bytes) / kv)
    if capacity < 1:
        raise ValueError("the weights leave no room for KV on this device")
    operations = device.operations * engine.operations_share
    return Cost(
        step_s=engine.pass_s + weights_s,
        request_s=engine.request_s,
        kv_token_s=kv / (device.bandwidth * engine.kv_read_share),
        prefill_s=engine.pass_s + weights_s,
        prefill_token_s=2 * model.active / operations,
        copy_s=engine.message_s,
        copy_token_s=kv / (device.pcie * engine.pcie_share),
        copies_beside=True,
        copy_launch_s=model.layers * engine.launch_layer_s,
        migration_s=engine.message_s,
        migration_token_s=kv / (engine.network * engine.network_share),
        capacity=capacity,
        host=int(device.host_bytes / kv),
    )


MACHINES = {
    "r1-qwen-32b-h100": (R1_QWEN_32B, H100_96, VLLM_06),
    "r1-qwen-32b-h100-80": (R1_QWEN_32B, H100_80, VLLM_06),
    "r1-qwen-32b-h200": (R1_QWEN_32B, H200, VLLM_06),
    "qwen3-8b-h100": (QWEN3_8B, H100_80, SGLANG_05),
    "qwen3-8b-h200": (QWEN3_8B, H200, SGLANG_05),
    "qwen3-30b-a3b-h200": (QWEN3_30B_A3B, H200, SGLANG_05),
}


def preset(name: str, kv_read_share: float | None = None) -> Cost:
    """Costs of one of `MACHINES`. kv_read_share: see `Engine`; its own if unsaid."""
    model, device, engine = MACHINES[name]
    if kv_read_share is not None:
        engine = dataclasses.replace(engine, kv_read_share=kv_read_share)
    return derive(model, device, engine)


PRESETS = {name: preset(name) for name in MACHINES}
