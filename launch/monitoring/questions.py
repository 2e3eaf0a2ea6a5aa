"""What operators ask, and the PromQL that answers: a row of panels per worry."""

from __future__ import annotations

from dataclasses import dataclass

ONLY = 'instance=~"$server"'
SPAN = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    """title: the question. read: how to read the answer. queries: legend to PromQL. unit: one of
    Grafana's. stack: the queries are parts of a whole. none: what it means that there is no answer,
    where a server that is well may give none."""

    title: str
    read: str
    queries: dict[str, str]
    unit: str = "short"
    stack: bool = False
    none: str = ""


def rate(series: str, by: str = "", where: str = "") -> str:
    """Increase per second of a counter, summed over all labels but `by`."""
    labels = ONLY + (f", {where}" if where else "")
    return f"sum by ({by}) (rate(pascal:{series}{{{labels}}}[{SPAN}]))"


def mean(series: str, by: str = "", where: str = "") -> str:
    """Mean of a histogram's observations."""
    return f"{rate(f'{series}_sum', by, where)} / {rate(f'{series}_count', by, where)}"


def quantile(share: float, series: str, by: str = "", where: str = "") -> str:
    """A quantile of a histogram's observations."""
    labels = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({share}, {rate(f'{series}_bucket', labels, where)})"


def by_instance(expression: str, more: str = "") -> str:
    """The largest value of each instance. A server of one does not number it."""
    labels = ", ".join(filter(None, ("instance, dp_rank", more)))
    return f'label_replace(max by ({labels}) ({expression}), "dp_rank", "0", "dp_rank", "")'


def gauge(series: str) -> str:
    """A gauge: `sglang:token_usage`, say."""
    return f"{series}{{{ONLY}}}"


# Grafana's name of an instance: Prometheus' `instance` is the server.
INSTANCE = "{{instance}} instance {{dp_rank}}"

NO_START = "No request has come yet."
NO_PAUSE = "No pause: the device's memory has sufficed."
NO_MIGRATION = "No migration: one instance, or migration is off."

ROWS: dict[str, list[Panel]] = {
    "What users feel": [
        Panel(
            "How long do users wait for the answer?",
            "Arrival to the first answering token (TTFO).",
            {f"p{share * 100:g}": quantile(share, "ttfo_seconds") for share in (0.5, 0.95, 0.99)},
            "s",
        ),
        Panel(
            "Do answers keep the reader's pace?",
            "Share of answers whose QoE ended below the promise; QoE of the worst twentieth.",
            {
                "SLO violations": f"{rate('slo_violations_total')} / "
                + rate("requests_total", where='outcome="answered"'),
                "QoE, p5": quantile(0.05, "answer_qoe"),
            },
            "percentunit",
        ),
        Panel(
            "How do requests end?",
            "no_answer: the request ended inside its thinking.",
            {"{{outcome}}": rate("requests_total", "outcome")},
            "reqps",
        ),
    ],
    "Why did TTFO rise?": [
        Panel(
            "Which part of it grew?",
            "Means. Before the first token: waiting and prefill. Thinking: decoding of the hidden "
            "tokens, pauses included. After it: until the first answering token.",
            {
                "before the first token": mean("ttft_seconds"),
                "thinking": mean("reasoning_seconds"),
                "after thinking": f"clamp_min({mean('ttfo_seconds')} - {mean('ttft_seconds')} - "
                f"{mean('reasoning_seconds')}, 0)",
            },
            "s",
            stack=True,
        ),
        Panel(
            "Do requests think longer?",
            "Tokens per request that ended. If these rise, the load has changed.",
            {
                "thinking": f"{rate('reasoning_tokens_total')} / {rate('requests_total')}",
                "answering": f"{rate('answer_tokens_total')} / {rate('requests_total')}",
            },
        ),
        Panel(
            "Does a thinking token take longer?",
            "First token to the end of thinking, per thinking token. Slower steps and pauses both "
            "raise it; the row below tells which.",
            {
                "per thinking token": f"{rate('reasoning_seconds_sum')} / "
                + rate("reasoning_tokens_total")
            },
            "s",
        ),
        Panel(
            "What keeps the best in line from starting?",
            "Share of scheduler passes. memory, slots: nobody of worse rank holds enough of it. "
            "rank: those who hold it are as good.",
            {
                "{{shortage}}": f"{rate('blocked_passes_total', 'shortage')} / on () group_left () "
                + rate("policy_passes_total")
            },
            "percentunit",
            stack=True,
        ),
        Panel(
            "Is KV memory full?",
            "Pauses begin where this reaches 1; with room to spare, look at the length of steps.",
            {INSTANCE: by_instance(gauge("sglang:token_usage"))},
            "percentunit",
        ),
        Panel(
            "How many run, how many wait?",
            "SGLang's own counts. Paused requests wait; the row on starving tells them apart.",
            {
                f"{INSTANCE} running": by_instance(gauge("sglang:num_running_reqs")),
                f"{INSTANCE} waiting": by_instance(gauge("sglang:num_queue_reqs")),
            },
        ),
    ],
    "Who was paused, and why?": [
        Panel(
            "Who was paused?",
            "Pauses per second by class of the one who left.",
            {"{{class}}": rate("pauses_total", "class")},
            "ops",
            stack=True,
            none=NO_PAUSE,
        ),
        Panel(
            "Why?",
            "growth: the next steps of those who run would not have fit. displaced: for somebody "
            "of better rank. memory: this very step did not fit.",
            {"{{why}}": rate("pauses_total", "why")},
            "ops",
            stack=True,
            none=NO_PAUSE,
        ),
        Panel(
            "Where did their KV go?",
            "resident: on the device. host: comes back by a copy. recompute: prefilled again.",
            {"{{tier}}": rate("paused_kv_total", "tier")},
            "ops",
            stack=True,
            none=NO_PAUSE,
        ),
        Panel(
            "How much KV leaves the device?",
            "Bytes per second and rank, by tier. host crosses the bus, and crosses it again.",
            {"{{tier}}": rate("paused_bytes_total", "tier")},
            "Bps",
            none=NO_PAUSE,
        ),
        Panel(
            "Is host memory for paused KV full?",
            "Where this reaches 1, pauses drop KV, and it is computed twice.",
            {
                INSTANCE: by_instance(
                    f"{gauge('pascal:host_kv_tokens')} / "
                    f"({gauge('pascal:host_kv_capacity_tokens')} > 0)"
                )
            },
            "percentunit",
            none="No host memory for paused KV: pauses drop it.",
        ),
        Panel(
            "How much is computed twice?",
            "Tokens per second that will be prefilled again.",
            {"tokens dropped": rate("paused_tokens_total", where='tier="recompute"')},
            none="No pause has dropped KV.",
        ),
        Panel(
            "Who is never paused?",
            "Requests per second that arrived and are not paused, by the feature of theirs or of "
            "the server that keeps them from it.",
            {"{{reason}}": rate("unpausable_requests_total", "reason")},
            "ops",
            stack=True,
            none="Every request that arrived can be paused.",
        ),
        Panel(
            "At which level do instances run?",
            "0 observe, 1 order, 2 recompute, 3 pause, 4 move; and the features that keep them "
            "from the next level.",
            {f"{INSTANCE}: {{{{reason}}}}": by_instance(gauge("pascal:support_level"), "reason")},
        ),
        Panel(
            "What became of conversations that waited for a tool?",
            "Per second. copied: the next turn got its KV from host memory. resident: the device "
            "had it still. lost: it was prefilled again. expired: no next turn came in time. "
            "forgotten: there were too many.",
            {"{{outcome}}": rate("tool_turns_total", "outcome")},
            "ops",
            stack=True,
            none="--pascal-tool-kv is off.",
        ),
        Panel(
            "Is host memory for such conversations full?",
            "Where this reaches 1, KV of further ones waits in the prefix cache, and may be lost.",
            {
                INSTANCE: by_instance(
                    f"{gauge('pascal:tool_kv_bytes')} / "
                    f"({gauge('pascal:tool_kv_capacity_bytes')} > 0)"
                )
            },
            "percentunit",
            none="--pascal-tool-kv is off.",
        ),
        Panel(
            "Who comes back, and from where?",
            "Starts per second: admissions from waiting, resumes from resident and host.",
            {"{{class}} from {{status}}": rate("starts_total", "class, status")},
            "ops",
            stack=True,
            none=NO_START,
        ),
    ],
    "What moved?": [
        Panel(
            "How many requests change their instance?",
            "Moves per second that an instance was the source of: moved, or why the request stayed "
            "where it was.",
            {"{{outcome}}": rate("migrations_total", "outcome", 'way="out"')},
            "ops",
            stack=True,
            none=NO_MIGRATION,
        ),
        Panel(
            "Why do they move, or stay?",
            "Decisions at the end of thinking, per second.",
            {"{{why}}": rate("boundary_decisions_total", "why")},
            "ops",
            stack=True,
            none=NO_MIGRATION,
        ),
        Panel(
            "How long is a reader without tokens?",
            "Last token on one instance to the first on the next.",
            {
                f"p{share * 100:g}": quantile(share, "migration_blocking_seconds")
                for share in (0.5, 0.99)
            },
            "s",
            none=NO_MIGRATION,
        ),
        Panel(
            "How much KV crosses between instances?",
            "Bytes per second and rank.",
            {"sent": rate("migrated_bytes_total")},
            "Bps",
            none=NO_MIGRATION,
        ),
        Panel(
            "Who cannot move?",
            "Requests per second that ended their thinking and cannot move, by reason.",
            {"{{reason}}": rate("unmovable_requests_total", "reason")},
            "ops",
            none="Every request that ended its thinking could move, or none was asked to.",
        ),
        Panel(
            "Where do new requests go?",
            "By instance; even only as long as the instances are.",
            {INSTANCE: rate("placed_requests_total", "instance, dp_rank")},
            "reqps",
            stack=True,
            none="One instance: every request goes there.",
        ),
        Panel(
            "Are all instances alive?",
            "Instances by state. silent: it has not reported for 5 s. dead: its process has ended.",
            {"{{instance}} {{state}}": f"sum by (instance, state) ({gauge('pascal:instances')})"},
            none="One instance: it lives as long as the server answers.",
        ),
    ],
    "Is anybody starving?": [
        Panel(
            "Who does not run now?",
            "By class, and by where its KV is. A line that only rises is a class that starves.",
            {"{{class}}, {{status}}": f"sum by (class, status) (pascal:queued_requests{{{ONLY}}})"},
            stack=True,
            none=NO_START,
        ),
        Panel(
            "How long has the first in line waited?",
            "The longest wait that goes on, by class. An answer ahead of its reader does not wait.",
            {
                f"{INSTANCE}: {{{{class}}}}": by_instance(
                    gauge("pascal:longest_wait_seconds"), "class"
                )
            },
            "s",
            none="Nobody has waited for a second.",
        ),
        Panel(
            "How long were the longest waits?",
            "99th percentile of the waits that ended, by class and place.",
            {"{{class}}, {{status}}": quantile(0.99, "wait_seconds", "class, status")},
            "s",
            none=NO_START,
        ),
        Panel(
            "Is any queue left unserved?",
            "Starts per second for each who waits, by class: zero for long, while somebody waits, "
            "is starvation.",
            {
                "{{class}}": f"{rate('starts_total', 'class')} / on (class) "
                f"(sum by (class) (pascal:queued_requests{{{ONLY}}}) > 0)"
            },
            none="Nobody waits.",
        ),
    ],
    "What does scheduling cost?": [
        Panel(
            "How long does a pass take?",
            "The policy's time per pass, pauses and resumes included.",
            {"per pass": f"{rate('policy_seconds_total')} / {rate('policy_passes_total')}"},
            "s",
        ),
        Panel(
            "What share of the time is that?",
            "Of the time of its scheduler process.",
            {INSTANCE: by_instance(f"rate(pascal:policy_seconds_total{{{ONLY}}}[{SPAN}])")},
            "percentunit",
        ),
        Panel(
            "Did the policy ever fail?",
            "Passes in which SGLang's own order stood in. The server's log has the error.",
            {"errors": rate("policy_errors_total")},
            "ops",
        ),
    ],
}
