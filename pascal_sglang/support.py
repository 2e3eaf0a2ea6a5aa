"""What this package does with SGLang's features and with kinds of requests: one table.

The launcher, the engine and `docs/compatibility.md` read it. A row gives the highest level that a
feature leaves; to raise a feature is to change its row. A server runs at the lowest level of the
rows that hold for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Level(IntEnum):
    """What is done for a server or a request; each level includes the ones before it."""

    OBSERVE = 0  # phases are measured, SGLang's order is untouched
    ORDER = 1  # our order of admission and retraction; SGLang decides what fits
    RECOMPUTE = 2  # pauses drop KV and prefill again
    PAUSE = 3  # pauses keep KV
    MOVE = 4  # pauses keep KV, and requests can change instance

    def __str__(self) -> str:
        return self.name.lower()


LEVELS = tuple(map(str, Level))


@dataclass(frozen=True, slots=True)
class Row:
    """A feature as messages and metrics call it, and the level that it leaves."""

    name: str
    level: Level
    # Whether the configuration, the server arguments, the scheduler or the request has it.
    holds: Callable[[Any], bool]
    # Why no higher level, for docs/compatibility.md.
    why: str = ""
    # Of a request. False: a pause keeps its KV, which a second prefill would not make again.
    recomputes: bool = True


@dataclass(frozen=True, slots=True)
class Support:
    """The level that a server, an instance or a request gets."""

    level: Level = Level.MOVE
    # The features that keep it from the next level.
    lowered_by: tuple[str, ...] = ()

    def lowered(self, level: Level, *names: str) -> Support:
        """The same with features that leave `level`."""
        if level > self.level or level is Level.MOVE:
            return self
        before = self.lowered_by if level == self.level else ()
        return Support(level, (*before, *(name for name in names if name not in before)))

    def under(self, rows: Iterable[Row], subject: Any) -> Support:
        """The same with the rows that hold for a subject."""
        found = self
        for row in rows:
            if row.level <= found.level and row.holds(subject):
                found = found.lowered(row.level, row.name)
        return found

    @property
    def because(self) -> str | None:
        """The first of the features, as metrics name it; None at the highest level."""
        return next(iter(self.lowered_by), None)

    @property
    def reason(self) -> str:
        """The features in one text; empty at the highest level."""
        return ", ".join(self.lowered_by)

    def __str__(self) -> str:
        return f"{self.level} ({self.reason})" if self.lowered_by else str(self.level)

    def describe(self) -> dict[str, Any]:
        """For `GET /pascal/status` and the handshake."""
        return {"level": str(self.level), "lowered_by": list(self.lowered_by)}

    @classmethod
    def described(cls, said: dict[str, Any]) -> Support:
        """What `describe` said."""
        return cls(Level[said["level"].upper()], tuple(said["lowered_by"]))

    @classmethod
    def least(cls, supports: Iterable[Support]) -> Support:
        """What several instances together give."""
        found = cls()
        for support in supports:
            found = found.lowered(support.level, *support.lowered_by)
        return found


EVERYTHING = Support()


def first(rows: Iterable[Row], subject: Any) -> str | None:
    """The name of the first row that holds; None if none does."""
    return next((row.name for row in rows if row.holds(subject)), None)


def instances_of(server_args: Any) -> int:
    """Instances of a server: replicas, or the ranks of DP attention."""
    # SGLang 0.5.21 counts both by `dp_size`.
    count: int = server_args.dp_size * getattr(server_args, "attn_dp_size", 1)
    return count


def _rust_server(_: Any) -> bool:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_RUST_SERVER.get())


def _odd_windows(scheduler: Any) -> bool:
    """A pool of windows that is not beside one of whole KV, or whose entries are a row's, not a
    token's; or windows that a prompt never leaves."""
    if not scheduler.is_hybrid_swa:
        return False
    allocator = scheduler.token_to_kv_pool_allocator
    plain = type(allocator).__name__ == "SWATokenToKVPoolAllocator" and not allocator.swa_req_ring
    kept = scheduler.tp_worker.model_runner.prefill_aware_swa
    return not plain or kept


# Speculative decoding whose drafts are chains, and which keeps KV and one row of a request.
CHAINS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
# Of our own configuration.
CONFIG = (
    Row(
        "a policy in SGLang's order",
        Level.OBSERVE,
        lambda c: not c.record.schedules,
        "that is what it is for",
    ),
    Row(
        "a policy that does not place requests",
        Level.PAUSE,
        lambda c: c.record.placement is None,
        "no instance is chosen by phase",
    ),
    Row(
        "--load-balance-method",
        Level.PAUSE,
        lambda c: c.placement == "sglang",
        "SGLang's balancing places the requests",
    ),
)
# Of our own configuration, where there are several instances.
MIGRATION = (
    Row(
        "--pascal-migration off",
        Level.PAUSE,
        lambda c: c.places and not c.can_migrate,
        "that is the default, except under `paper`",
    ),
)
# Of SGLang's server arguments. At the level OBSERVE the server runs as under `fcfs`.
SERVER = (
    Row(
        "another --speculative-algorithm",
        Level.ORDER,
        lambda a: a.speculative_algorithm not in (None, "NGRAM", *CHAINS),
        "what its drafts keep of a request is not known here",
    ),
    Row(
        "--speculative-algorithm NGRAM",
        Level.ORDER,
        lambda a: a.speculative_algorithm == "NGRAM",
        "not seen: it proposes and verifies by compiled packages that a CPU does not have, and "
        "goes on from the tokens of a step that are kept with the request's row",
    ),
    Row(
        "--speculative-use-rejection-sampling",
        Level.PAUSE,
        lambda a: a.speculative_use_rejection_sampling,
        "the draft model's probabilities do not travel",
    ),
    Row(
        "--speculative-eagle-topk above 1",
        Level.RECOMPUTE,
        lambda a: a.speculative_algorithm in CHAINS and (a.speculative_eagle_topk or 1) > 1,
        "the row of a tree of drafts has not been tried",
    ),
    Row(
        "--enable-multi-layer-eagle",
        Level.RECOMPUTE,
        lambda a: a.enable_multi_layer_eagle,
        "the rows of its layers have not been tried",
    ),
    Row(
        "--speculative-adaptive",
        Level.RECOMPUTE,
        lambda a: a.speculative_adaptive,
        "a row made under another number of steps has not been tried",
    ),
    Row(
        "--pp-size above 1",
        Level.ORDER,
        lambda a: a.pp_size > 1,
        "a stage does not know when another one's copies of KV are complete",
    ),
    Row(
        "--pp-size above 1 with drafts",
        Level.OBSERVE,
        lambda a: a.pp_size > 1 and a.speculative_algorithm is not None,
        "the draft model is on the last stage alone",
    ),
    Row(
        "--disaggregation-mode",
        Level.OBSERVE,
        lambda a: a.disaggregation_mode != "null",
        "its event loops ask for no plan: on the decode side a request has its KV before it waits, "
        "and a retracted one comes back from a queue of its own",
    ),
    Row(
        "--enable-hierarchical-cache",
        Level.PAUSE,
        lambda a: a.enable_hierarchical_cache,
        "a prefix that its host pool holds does not travel",
    ),
    Row(
        "--hicache-storage-backend",
        Level.ORDER,
        lambda a: a.hicache_storage_backend is not None,
        "SGLang alone looks there for a request that waits again",
    ),
    Row(
        "--enable-hisparse",
        Level.ORDER,
        lambda a: a.enable_hisparse,
        "its coordinator holds requests between prefill and decoding",
    ),
    Row(
        "--enable-lmcache",
        Level.ORDER,
        lambda a: a.enable_lmcache,
        "a look for a prefix loads it",
    ),
    Row("--enable-flexkv", Level.ORDER, lambda a: a.enable_flexkv, "a look for a prefix loads it"),
    Row(
        "--enable-unified-cache-external-linker",
        Level.ORDER,
        lambda a: a.enable_unified_cache_external_linker,
        "a look for a prefix loads it",
    ),
    Row(
        "--radix-cache-backend",
        Level.ORDER,
        lambda a: a.radix_cache_backend is not None,
        "what a look for a prefix does there is not known here",
    ),
    Row(
        "--enable-unified-memory",
        Level.ORDER,
        lambda a: a.enable_unified_memory,
        "its pools take memory from each other",
    ),
    Row(
        "--enable-pdmux",
        Level.OBSERVE,
        lambda a: a.enable_pdmux,
        "its event loop prefills without asking for a plan",
    ),
    Row(
        "--dcp-size above 1",
        Level.ORDER,
        lambda a: a.dcp_size > 1,
        "a rank holds a share of each request's KV",
    ),
    Row(
        "--attn-cp-size above 1",
        Level.OBSERVE,
        lambda a: a.attn_cp_size > 1,
        "several ranks of an instance lead",
    ),
    Row(
        "--dllm-algorithm",
        Level.OBSERVE,
        lambda a: a.dllm_algorithm is not None,
        "blocks of tokens are decoded by a scheduler of its own",
    ),
    Row("--is-embedding", Level.OBSERVE, lambda a: a.is_embedding, "nothing decodes"),
)
# Of a scheduler whose pools exist. The level OBSERVE is for features that `SERVER` tells too: the
# controller places requests by then.
POOLS = (
    Row(
        "a model that generates nothing",
        Level.OBSERVE,
        lambda s: not s.is_generation,
        "nothing decodes",
    ),
    Row(
        "a hybrid pool before SGLang 0.5.22",
        Level.OBSERVE,
        lambda s: (
            not getattr(s, "reads_hybrid_pools", True) and (s.is_hybrid_swa or s.is_hybrid_ssm)
        ),
        "what of it a request holds was not read there",
    ),
    Row(
        "a pool of sliding windows alone, or rings",
        Level.ORDER,
        _odd_windows,
        "what of it a request holds is not known here",
    ),
    Row(
        "speculative decoding beside windows or recurrent states",
        Level.RECOMPUTE,
        lambda s: s.spec_algorithm.is_some() and (s.is_hybrid_swa or s.is_hybrid_ssm),
        "what drafts do to them was never seen",
    ),
)
# Of a pool whose KV is more than rows of tensors that we know.
COPIES = (
    Row(
        "KV that is not copied",
        Level.RECOMPUTE,
        lambda copies: not copies.copies,
        "a copy would leave scales behind, or its rows are not tokens",
    ),
    Row(
        "KV that its pool alone can copy",
        Level.PAUSE,
        lambda copies: copies.copies and copies.buffers is None,
        "the form of a copy is the pool's own",
    ),
)
# Of a scheduler whose pools exist and whose pauses keep KV: where one holds, or one of `COPIES`, no
# KV is kept for conversations that wait for a tool.
TOOL_KV = (
    Row(
        "--disable-radix-cache",
        Level.PAUSE,
        lambda s: s.tree_cache.disable,
        "the next turn finds it in the prefix cache",
    ),
    Row(
        "--enable-hierarchical-cache",
        Level.PAUSE,
        lambda s: getattr(s.tree_cache, "cache_controller", None) is not None,
        "its host pool keeps whole prefixes by itself",
    ),
    Row(
        "sliding windows",
        Level.PAUSE,
        lambda s: s.is_hybrid_swa,
        "a part of a prefix has no window at its end",
    ),
    Row(
        "recurrent states",
        Level.PAUSE,
        lambda s: s.is_hybrid_ssm,
        "a part of a prefix has no state at its end",
    ),
    Row(
        "speculative decoding",
        Level.PAUSE,
        lambda s: s.spec_algorithm.is_some(),
        "the prefix cache goes by pairs of tokens there, which has not been tried",
    ),
)
# Of SGLang's server arguments: where one holds, no request migrates.
INSTANCES = (
    Row("one instance", Level.PAUSE, lambda a: instances_of(a) == 1, "there is no other one"),
    Row(
        "more than one node",
        Level.PAUSE,
        lambda a: a.nnodes > 1,
        "instances talk over sockets of one host",
    ),
    Row(
        "--tokenizer-worker-num above 1",
        Level.PAUSE,
        lambda a: a.tokenizer_worker_num > 1,
        "the detokenizer that serves several has a loop of its own, without our order of outputs",
    ),
    Row(
        "--detokenizer-worker-num above 1",
        Level.PAUSE,
        lambda a: a.detokenizer_worker_num > 1,
        "the text of a request is in one detokenizer",
    ),
    Row(
        "--skip-tokenizer-init",
        Level.PAUSE,
        lambda a: a.skip_tokenizer_init,
        "tokens leave an instance past the detokenizer, which puts those of two in order",
    ),
    Row(
        "SGLANG_RUST_SERVER",
        Level.PAUSE,
        _rust_server,
        "requests reach an instance past the controller",
    ),
)


def has_penalties(params: Any) -> bool:
    """Whether what a request with these sampling parameters has produced changes what it will."""
    return bool(
        params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
        or params.min_new_tokens
    )


# SGLang hands them to a request that it has made.
MULTIMODAL = Row(
    "multimodal inputs",
    Level.ORDER,
    lambda r: r.multimodal_inputs is not None,
    "its features are dropped after the prefill",
)
# Of a request (SGLang's `Req`).
REQUESTS = (
    Row(
        "beam search",
        Level.ORDER,
        # SGLang makes the group when the request begins.
        lambda r: (getattr(r.sampling_params, "beam_width", None) or 1) > 1,
        "its members hold rows of their own",
    ),
    Row(
        "a streaming session",
        Level.ORDER,
        lambda r: getattr(r.session, "streaming", False),
        "the session takes the KV of a request that lets go of it, though it will go on",
    ),
    MULTIMODAL,
    Row(
        "a session",
        Level.PAUSE,
        lambda r: r.session is not None or r.session_id is not None,
        "the session is where it was opened",
    ),
    Row(
        "input embeddings",
        Level.PAUSE,
        lambda r: r.input_embeds is not None,
        "a second prefill would lose its output",
        recomputes=False,
    ),
    Row(
        "a LoRA adapter",
        Level.PAUSE,
        lambda r: r.lora_id is not None,
        "its adapter may not be loaded elsewhere",
    ),
    Row(
        "hidden states returned",
        Level.PAUSE,
        lambda r: bool(r.return_hidden_states),
        "a prefill returns one block of them, and a decode step one each",
        recomputes=False,
    ),
    Row(
        "a watermark",
        Level.PAUSE,
        lambda r: r.sampling_params.watermark is not None,
        "its state does not travel",
    ),
)
# Of a request for which tokens are proposed.
DRAFTED = (
    Row(
        "penalties under speculative decoding",
        Level.ORDER,
        lambda r: has_penalties(r.sampling_params),
        "SGLang counts one token of each step there, and a pause would change which",
    ),
)
# Of SGLang's server arguments: front ends that load no plugin, or run none of the code that we hook
# into. What is asked of the front end is refused there.
FRONT_ENDS = (
    Row("--tokenizer-worker-num above 1", Level.OBSERVE, lambda a: a.tokenizer_worker_num > 1),
    Row("--smg-grpc-mode", Level.OBSERVE, lambda a: a.smg_grpc_mode or a.grpc_mode),
    Row("SGLANG_RUST_SERVER", Level.OBSERVE, _rust_server),
)


@dataclass(frozen=True, slots=True)
class Family:
    """Models that keep their KV alike."""

    names: str
    pool: str
    # The rows that hold for a server of such a model.
    rows: tuple[str, ...] = ()


# Named by their configuration's `model_type` or as their cards do; for docs/compatibility.md.
FAMILIES = (
    Family("Qwen3, Qwen2.5, QwQ, Llama 3, Mistral, the R1 distills, SmolLM", "MHA"),
    Family("DeepSeek V3, R1 and V3.1, Kimi K2, GLM-4.7-Flash", "MLA"),
    Family("DeepSeek V3.2, GLM-5", "MLA with index keys (DSA)", (COPIES[1].name,)),
    Family(
        "gpt-oss, Gemma 4, MiMo, Step-3.5, Llama 4",
        "MHA with sliding windows",
    ),
    Family(
        "Qwen3-Next, Qwen3.5 and 3.6, Kimi-Linear, Nemotron-H",
        "MHA or MLA with recurrent states",
    ),
)


def of_server(config: Any, server_args: Any) -> Support:
    """What the configuration and the arguments of a server leave."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    # What was given may stand for something else: an alias, or what a model asks for.
    resolved = resolved_view(server_args)
    found = EVERYTHING.lowered(Level[config.most_level.upper()], "a test")
    found = found.under(CONFIG, config)
    if instances_of(resolved) > 1:
        found = found.under(MIGRATION, config)
    return found.under((*SERVER, *INSTANCES), resolved)


NOT_RECOMPUTED = tuple(row for row in REQUESTS if not row.recomputes)


def of_request(
    req: Any, server: Support = EVERYTHING, *, drafted: bool = False, multimodal: bool = False
) -> Support:
    """What a request gets on a server that leaves `server`.

    drafted: tokens are proposed for it. multimodal: SGLang will hand it multimodal inputs.
    """
    found = EVERYTHING.under((*REQUESTS, *DRAFTED) if drafted else REQUESTS, req)
    if multimodal:
        found = found.lowered(MULTIMODAL.level, MULTIMODAL.name)
    found = found.lowered(server.level, *server.lowered_by)
    kept = first(NOT_RECOMPUTED, req) if found.level is Level.RECOMPUTE else None
    return found if kept is None else found.lowered(Level.ORDER, kept)
