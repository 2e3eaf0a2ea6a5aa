"""What becomes of SGLang's flags and environment variables that bear on scheduling: one table.

The engine says at start which of those that are given it overrides; `docs/compatibility.md` shows
them all. At the level `OBSERVE` all are SGLang's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pascal_sglang.support import Level


class Effect(Enum):
    """What a policy that schedules makes of a setting."""

    HONOURED = "honoured"
    OVERRIDDEN = "overridden"


@dataclass(frozen=True, slots=True)
class Setting:
    """Flags or environment variables of one purpose."""

    names: tuple[str, ...]
    effect: Effect
    # How it is honoured, or what stands in its place.
    how: str
    # HONOURED: the test that shows it.
    test: str = ""
    # OVERRIDDEN: from this level on. Below it, it is SGLang's own.
    since: Level = Level.ORDER
    # OVERRIDDEN, of flags: whether the server arguments ask for it.
    given: Callable[[Any], bool] = lambda a: False


HONOURED, OVERRIDDEN = Effect.HONOURED, Effect.OVERRIDDEN
PREFILL = "by SGLang's prefill, within what the plan admits"
QUEUE_LIMIT = "test_a_full_queue_counts_the_paused_and_ends_none_that_has_begun"
PREFILL_LIMITS = "test_a_prefill_keeps_sglangs_limits"

SETTINGS = (
    Setting(
        ("--schedule-policy",),
        OVERRIDDEN,
        "the policy's own order stands, in the queue and in a prefill",
        given=lambda a: a.schedule_policy != "fcfs",
    ),
    Setting(
        ("--retraction-policy",),
        OVERRIDDEN,
        "requests leave in the policy's order; it knows their priorities with "
        "--enable-priority-scheduling",
        given=lambda a: a.retraction_policy != "length" and not a.enable_priority_scheduling,
    ),
    Setting(
        ("--schedule-conservativeness",),
        OVERRIDDEN,
        "the plan says what fits, and pauses where it was wrong",
        since=Level.RECOMPUTE,
        given=lambda a: a.schedule_conservativeness != 1.0,
    ),
    Setting(
        (
            "SGLANG_INIT_NEW_TOKEN_RATIO",
            "SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR",
            "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS",
            "SGLANG_RETRACT_DECODE_STEPS",
        ),
        OVERRIDDEN,
        "the plan says what fits, and pauses where it was wrong",
        since=Level.RECOMPUTE,
    ),
    Setting(
        ("SGLANG_DATA_PARALLEL_BUDGET_INTERVAL",),
        OVERRIDDEN,
        "requests are placed by phase, except with --load-balance-method",
    ),
    Setting(
        ("SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION",),
        HONOURED,
        "where it is not set, a prefill keeps 4 tokens for what a request may write from the level "
        "recompute on, because a plan decides, and SGLang's 4096 below",
        "test_in_our_order_sglang_retracts_and_nothing_is_paused",
    ),
    Setting(
        (
            "--enable-priority-scheduling",
            "--schedule-low-priority-values-first",
            "--default-priority-value",
            "--priority-scheduling-preemption-threshold",
            "--disable-priority-preemption",
        ),
        HONOURED,
        "by the plan, whose pauses keep KV ([policies.md](policies.md#priorities)); at the level "
        "order no request makes way for one of better priority",
        "test_a_higher_priority_ends_first_and_tokens_stay",
    ),
    Setting(
        ("--abort-on-priority-when-disabled",),
        HONOURED,
        "SGLang's own; it looks at a request before the policy does",
        "test_where_priorities_are_off_a_request_with_one_may_be_refused",
    ),
    Setting(
        ("--max-running-requests",),
        HONOURED,
        "as the slots of a plan; a paused request has none",
        PREFILL_LIMITS,
    ),
    Setting(
        ("--max-queued-requests",),
        HONOURED,
        "a paused request counts as queued; one that has begun is never ended to make room",
        QUEUE_LIMIT,
    ),
    Setting(
        ("SGLANG_REQ_WAITING_TIMEOUT",),
        HONOURED,
        "for paused requests too ([observability.md](observability.md))",
        "test_the_waiting_time_out_runs_from_the_pause_on",
    ),
    Setting(
        ("SGLANG_REQ_RUNNING_TIMEOUT",),
        HONOURED,
        "from the first step on, pauses included; a request ends by it while it runs",
        "test_the_running_time_out_runs_from_the_first_step",
    ),
    Setting(
        ("--chunked-prefill-size", "--prefill-max-requests"),
        HONOURED,
        PREFILL,
        PREFILL_LIMITS,
    ),
    Setting(
        ("--max-prefill-tokens",),
        HONOURED,
        PREFILL,
        "test_an_interval_is_for_large_batches_and_a_reserve_that_is_given_stays",
    ),
    Setting(
        ("SGLANG_PREFILL_TILE_BUDGET",),
        HONOURED,
        f"{PREFILL}; SGLang reads it on AMD GPUs alone",
        "test_flags_change_no_token_under_pauses",
    ),
    Setting(
        ("--prefill-decode-interval", "--prefill-decode-interval-min-bs"),
        HONOURED,
        "where the interval is not given it is 1: a prefill and a decode step take turns",
        PREFILL_LIMITS,
    ),
    Setting(
        ("--enable-mixed-chunk",),
        HONOURED,
        "running requests decode inside a prefill",
        "test_flags_change_no_token_under_pauses",
    ),
    Setting(
        ("--min-free-slots-delay",),
        HONOURED,
        "after the plan: a pass whose prefill it delays admits none, and the next pass plans anew",
        "test_a_prefill_waits_for_free_slots",
    ),
    Setting(
        (
            "--enable-prefill-delayer",
            "--prefill-delayer-max-delay-passes",
            "--prefill-delayer-token-usage-low-watermark",
            "--prefill-delayer-queue-min-ratio",
            "--prefill-delayer-max-delay-ms",
        ),
        HONOURED,
        "after the plan, as the delay by free slots; the queue that it looks at is what the plan "
        "admits",
        "test_a_prefill_is_delayed",
    ),
    Setting(
        ("--scheduler-recv-interval", "SGLANG_SCHEDULER_MAX_RECV_PER_POLL"),
        HONOURED,
        "by SGLang's receiver; control messages come in with the requests",
        "test_a_poll_that_sglang_skips_takes_nothing",
    ),
    Setting(
        (
            "SGLANG_TEST_RETRACT",
            "SGLANG_TEST_RETRACT_INTERVAL",
            "SGLANG_TEST_RETRACT_NO_PREFILL_BS",
        ),
        HONOURED,
        "SGLang retracts, in the policy's order",
        "test_a_retraction_of_sglangs_own_is_survived",
    ),
    Setting(
        ("--disable-overlap-schedule",),
        HONOURED,
        "a pause does not wait for a token in flight",
        "test_chaos_is_invisible",
    ),
    Setting(
        ("--enable-strict-thinking", "SGLANG_MAX_THINK_TOKENS"),
        HONOURED,
        "requests are paused and migrate: the object that follows their thinking is made anew",
        "test_a_grammar_goes_on_after_pauses_and_elsewhere",
    ),
    Setting(
        ("--strip-thinking-cache",),
        HONOURED,
        "a request that ends leaves its prompt alone in the prefix cache, and what a second "
        "prefill has put there",
        "test_flags_change_no_token_under_pauses",
    ),
    Setting(
        ("--enable-session-radix-cache",),
        HONOURED,
        "requests with a session are paused, and stay where it was opened",
        "test_every_kind_survives_pauses_on_every_tier",
    ),
    Setting(
        ("--max-loras-per-batch",),
        HONOURED,
        "a paused request comes back when its adapter fits beside those of the batch",
        "test_a_request_comes_back_when_its_adapter_fits",
    ),
    Setting(
        ("--lora-drain-wait-threshold", "--enable-lora-overlap-loading"),
        HONOURED,
        "for paused requests too: an adapter makes room for theirs, and is loaded before they come "
        "back",
        "test_pauses_change_no_token_of_a_session_with_an_adapter",
    ),
    Setting(
        ("--load-balance-method",),
        HONOURED,
        "in the place of our placement; no request migrates then",
        "test_a_level_names_what_lowered_it",
    ),
)


def overridden(
    server_args: Any, level: Level, environ: Mapping[str, str] = os.environ
) -> Iterator[tuple[str, str]]:
    """Of what was given, what is overridden at this level, and what stands in its place."""
    for setting in SETTINGS:
        if setting.effect is not OVERRIDDEN or level < setting.since:
            continue
        for name in setting.names:
            if name in environ or (name.startswith("--") and setting.given(server_args)):
                yield name, setting.how
