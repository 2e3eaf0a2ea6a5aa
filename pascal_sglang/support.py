"""What this package does with SGLang's features and with kinds of requests: one table.

The launcher, the engine and `docs/compatibility.md` read it. A row gives the highest level that a
feature leaves. Under a policy that does not schedule (`fcfs`), everything that SGLang serves is
served, at the level `OBSERVE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Level(IntEnum):
    """What is done for a server or a request; each level includes the ones before it."""

    OBSERVE = 0  # phases are measured, SGLang's order is untouched
    ORDER = 1  # our order of admission and retraction
    RECOMPUTE = 2  # pauses drop KV and prefill again
    PAUSE = 3  # pauses keep KV
    MIGRATE = 4  # pauses keep KV, and requests can change instance


@dataclass(frozen=True, slots=True)
class Row:
    """A feature as messages and metrics call it, and the level that it leaves."""

    name: str
    level: Level
    # Whether the server arguments, the scheduler or the request at hand have it.
    holds: Callable[[Any], bool]


def first(rows: Iterable[Row], subject: Any) -> str | None:
    """The name of the first row that holds; None if none does."""
    return next((row.name for row in rows if row.holds(subject)), None)


# Of SGLang's server arguments. At the level OBSERVE, a scheduling policy is refused at start.
SERVER = (
    Row(
        "--speculative-algorithm other than EAGLE, EAGLE3 and STANDALONE",
        Level.OBSERVE,
        lambda a: a.speculative_algorithm not in (None, "EAGLE", "EAGLE3", "STANDALONE"),
    ),
    Row("--pp-size above 1", Level.OBSERVE, lambda a: a.pp_size > 1),
    Row("--enable-dp-attention", Level.OBSERVE, lambda a: a.enable_dp_attention),
    Row("--disaggregation-mode", Level.OBSERVE, lambda a: a.disaggregation_mode != "null"),
    Row("--enable-hierarchical-cache", Level.OBSERVE, lambda a: a.enable_hierarchical_cache),
    Row("--enable-hisparse", Level.OBSERVE, lambda a: a.enable_hisparse),
    Row("--enable-lmcache", Level.OBSERVE, lambda a: a.enable_lmcache),
    Row("--enable-unified-memory", Level.OBSERVE, lambda a: a.enable_unified_memory),
    Row("--enable-pdmux", Level.OBSERVE, lambda a: a.enable_pdmux),
    Row("--dcp-size above 1", Level.OBSERVE, lambda a: a.dcp_size > 1),
    Row("--attn-cp-size above 1", Level.OBSERVE, lambda a: a.attn_cp_size > 1),
    Row("--dllm-algorithm", Level.OBSERVE, lambda a: a.dllm_algorithm is not None),
)
# Of SGLang's server arguments: what a scheduling policy takes the place of.
REPLACED = (Row("--schedule-policy", Level.MIGRATE, lambda a: a.schedule_policy != "fcfs"),)
# Of a scheduler whose pools exist.
POOLS = (
    Row("a pool with sliding windows", Level.OBSERVE, lambda s: s.is_hybrid_swa),
    Row("a pool of recurrent states (Mamba)", Level.OBSERVE, lambda s: s.is_hybrid_ssm),
    Row("DP attention", Level.OBSERVE, lambda s: s.attn_dp_enabled),
)
# Of a server with several instances: where one holds, no request migrates.
INSTANCES = (
    Row("more than one node", Level.PAUSE, lambda i: i.nnodes > 1),
    Row("--tokenizer-worker-num above 1", Level.PAUSE, lambda i: i.tokenizer_worker_num > 1),
    Row("--detokenizer-worker-num above 1", Level.PAUSE, lambda i: i.detokenizer_worker_num > 1),
    Row("--skip-tokenizer-init", Level.PAUSE, lambda i: i.skip_tokenizer_init),
    Row("SGLANG_RUST_SERVER", Level.PAUSE, lambda i: i.rust_server is not None),
)
# Of a request (SGLang's `Req`). At the level ORDER it is not paused and does not migrate.
REQUESTS = (
    Row("beam search", Level.ORDER, lambda r: r.beam_group is not None),
    Row("a session", Level.ORDER, lambda r: r.session is not None or r.session_id is not None),
    Row("multimodal inputs", Level.ORDER, lambda r: r.multimodal_inputs is not None),
    Row("input embeddings", Level.ORDER, lambda r: r.input_embeds is not None),
    Row("a LoRA adapter", Level.ORDER, lambda r: r.lora_id is not None),
    Row("hidden states returned", Level.ORDER, lambda r: bool(r.return_hidden_states)),
    Row("a grammar", Level.ORDER, lambda r: _has_grammar(r.sampling_params)),
    Row("penalties", Level.ORDER, lambda r: _has_penalties(r.sampling_params)),
    Row("a watermark", Level.PAUSE, lambda r: r.sampling_params.watermark is not None),
)
# Of SGLang's server arguments: front ends that load no plugin, or run none of the code that we hook
# into. What is asked of the front end is refused there.
FRONT_ENDS = (
    Row("--tokenizer-worker-num above 1", Level.OBSERVE, lambda a: a.tokenizer_worker_num > 1),
    Row("--smg-grpc-mode", Level.OBSERVE, lambda a: a.smg_grpc_mode or a.grpc_mode),
)


def at_most(level: Level, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows that leave `level` or less."""
    return tuple(row for row in rows if row.level <= level)


def _has_grammar(params: Any) -> bool:
    return any((params.json_schema, params.regex, params.ebnf, params.structural_tag))


def _has_penalties(params: Any) -> bool:
    return bool(
        params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
        or params.min_new_tokens
    )


UNPAUSABLE = at_most(Level.ORDER, REQUESTS)
