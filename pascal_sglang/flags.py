"""The `--pascal-*` flags."""

from __future__ import annotations

import argparse

from pascal_sglang.config import (
    DEMOTE_ON,
    KV_TRANSPORTS,
    MIGRATIONS,
    PascalConfig,
)
from pascal_sglang.policy.registry import POLICIES


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the `--pascal-*` flags; defaults are `PascalConfig`'s own."""
    defaults = PascalConfig()
    group = parser.add_argument_group("pascal_sglang")
    group.add_argument(
        "--pascal-policy",
        metavar="{" + ",".join(POLICIES) + "} or MODULE:NAME",
        default=defaults.policy,
        help="pascal: thinking first, answers on pace; paper: PASCAL to the letter; rr: phase-"
        "blind round robin, rr-restart: its count restarts at the phase boundary; fcfs: SGLang's "
        "own order untouched; or a record of your own (default: %(default)s)",
    )
    group.add_argument(
        "--pascal-quantum-tokens",
        type=int,
        default=defaults.quantum_tokens,
        help="tokens a request runs before others of its class get their turn (%(default)s)",
    )
    group.add_argument(
        "--pascal-demote-tokens",
        type=int,
        default=defaults.demote_tokens,
        help="a thinker longer than this falls behind shorter ones (%(default)s)",
    )
    group.add_argument(
        "--pascal-demote-on",
        choices=DEMOTE_ON,
        default=defaults.demote_on,
        help="what counts towards that: all KV beyond the prompt, or thinking tokens (%(default)s)",
    )
    group.add_argument(
        "--pascal-answer-tpot-ms",
        type=float,
        default=defaults.answer_tpot_ms,
        help="the reader's pace: milliseconds per answering token (%(default)s)",
    )
    group.add_argument(
        "--pascal-qoe-slo",
        type=float,
        default=defaults.qoe_slo,
        help="answers whose QoE ends below this count as SLO violations (%(default)s)",
    )
    group.add_argument(
        "--pascal-host-kv-gb",
        type=float,
        default=defaults.host_kv_gb,
        help="host memory for paused KV, per instance (default: by the device pool's size)",
    )
    group.add_argument(
        "--pascal-migration",
        choices=MIGRATIONS,
        default=defaults.migration,
        help="with --dp-size above 1: whether a request may move to another instance at the end of "
        "its thinking; adaptive: where that helps, always: by counts alone (%(default)s)",
    )
    group.add_argument(
        "--pascal-live-migration",
        action=argparse.BooleanOptionalAction,
        default=defaults.live_migration,
        help="copy KV while the request still decodes; otherwise it stops first",
    )
    group.add_argument(
        "--pascal-kv-transport",
        choices=KV_TRANSPORTS,
        default=defaults.kv_transport,
        help="how KV moves; auto: shm, inside a host; mooncake: Mooncake Transfer Engine",
    )
    group.add_argument(
        "--pascal-kv-listen",
        metavar="ADDRESS",
        default=defaults.kv_listen,
        help="open mooncake at this IPv4 address of this host: all who reach it can read and write "
        "KV that moves (default: 127.0.0.1)",
    )
    group.add_argument(
        "--pascal-gpus",
        type=int,
        default=defaults.gpus,
        help="instances share this many GPUs, one beside the other, to try several on one; "
        "--mem-fraction-static has to leave room (default: each has its own)",
    )
    group.add_argument(
        "--pascal-pace-stream",
        action="store_true",
        default=defaults.pace_stream,
        help="release streamed answering tokens at the reader's pace",
    )
    group.add_argument(
        "--pascal-log-decisions",
        action="store_true",
        default=defaults.log_decisions,
        help="log every scheduling decision as one line of JSON",
    )
    group.add_argument(
        "--pascal-assume-reasoning",
        action="store_true",
        default=defaults.assume_reasoning,
        help="treat /generate requests that do not say require_reasoning as reasoning",
    )


def from_flags(options: argparse.Namespace) -> PascalConfig:
    """Build the configuration from parsed `--pascal-*` flags."""
    return PascalConfig(
        policy=options.pascal_policy,
        quantum_tokens=options.pascal_quantum_tokens,
        demote_tokens=options.pascal_demote_tokens,
        demote_on=options.pascal_demote_on,
        qoe_slo=options.pascal_qoe_slo,
        pace_stream=options.pascal_pace_stream,
        log_decisions=options.pascal_log_decisions,
        answer_tpot_ms=options.pascal_answer_tpot_ms,
        host_kv_gb=options.pascal_host_kv_gb,
        migration=options.pascal_migration,
        live_migration=options.pascal_live_migration,
        kv_transport=options.pascal_kv_transport,
        kv_listen=options.pascal_kv_listen,
        gpus=options.pascal_gpus,
        assume_reasoning=options.pascal_assume_reasoning,
    )
