"""What forecasts cost a pass: `python -m evals.bench.forecast_cost`.

A scheduler that does nothing has so many requests of SGLang's, a quarter of which run and think;
the others wait. In every pass those that run get a token, and `Forecasts.step` is timed. Looks and
forecasts take turns, as in a server. Prints microseconds: the mean of all passes, and of those in
which there was something to do the median, the P99 and the most; and milliseconds per forecast,
with the looks between.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from array import array
from types import SimpleNamespace
from typing import Any

SIZES = (32, 500, 2_000, 10_000)
PASS_S = 0.02
# Passes that are not timed, and those that are.
STARTING, PASSES = 150, 2_000
# Microseconds of a pass in which there was nothing to do.
IDLE_US = 5.0


def scene(count: int) -> tuple[Any, Any, list[Any]]:
    """The forecasts of a scheduler with `count` requests, its states, and those that run."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from pascal_sglang.config import PascalConfig
    from pascal_sglang.engine.forecasts import Forecasts
    from pascal_sglang.engine.observability.phases import PhaseTracker
    from pascal_sglang.engine.request_states import RequestStates
    from pascal_sglang.policy.ranking import PassInfo, Tuning
    from pascal_sglang.policy.registry import POLICIES
    from pascal_sglang.policy.request import RequestStatus

    running: list[Any] = []
    waiting: list[Any] = []
    scheduler: Any = SimpleNamespace(
        enable_priority_scheduling=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        server_args=SimpleNamespace(reasoning_parser="qwen3"),
        collect_inflight_reqs=lambda: running,
        running_batch=SimpleNamespace(reqs=running),
        waiting_queue=waiting,
        max_total_num_tokens=200 * count,
        max_running_requests=count,
    )
    paused: Any = SimpleNamespace(
        in_status=lambda *_: [], costs=SimpleNamespace(prefill_token_s=1e-4)
    )
    config = PascalConfig()
    states = RequestStates(scheduler, config, paused, None, None)  # type: ignore[arg-type]
    tracker = PhaseTracker(None, lambda live, _over, _now: states.observe(live))
    forecasts = Forecasts(scheduler, config, POLICIES["pascal"], Tuning(), states)
    for number in range(count):
        states.pass_info = PassInfo(0, number * 60.0 / count, PASS_S)
        params = SamplingParams(max_new_tokens=1 << 20)
        req = Req(str(number), None, array("q", range(200)), params, vocab_size=1 << 10)
        req.require_reasoning = True
        tracker.arrived(req, 0.0)
        state = states.arrived(req)
        forecasts.arrived(req)
        if number % 4:
            waiting.append(req)
            continue
        state.status = RequestStatus.RUNNING
        state.phase_tokens = state.total_tokens = number % 3000 + 1
        req.output_ids.extend([1] * state.total_tokens)
        running.append(req)
    return forecasts, states, running


def passes_us(count: int) -> tuple[list[float], int]:
    """What each pass took, and how many forecasts were made."""
    from pascal_sglang.engine.req_attributes import state_of
    from pascal_sglang.policy.ranking import PassInfo

    forecasts, states, running = scene(count)
    took: list[float] = []
    outlook, made = None, 0
    gc.collect()
    gc.disable()  # Its passes are the server's, not ours.
    try:
        for number in range(STARTING + PASSES):
            now = 60.0 + number * PASS_S
            states.pass_info = PassInfo(number, now, PASS_S)
            for req in running:
                state = state_of(req)
                state.phase_tokens += 1
                state.total_tokens += 1
            began = time.thread_time()
            forecasts.step(now)
            took.append((time.thread_time() - began) * 1e6)
            made += forecasts.outlook is not outlook and number >= STARTING
            outlook = forecasts.outlook
    finally:
        gc.enable()
    assert not forecasts.errors
    return took[STARTING:], made


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    head = ("requests", "forecasts", "mean", "median", "p99", "most", "ms each")
    print("".join(f"{name:>12}" for name in head))
    for count in SIZES:
        took, made = passes_us(count)
        busy = sorted(each for each in took if each > IDLE_US)
        figures = (
            statistics.mean(took),
            statistics.median(busy),
            busy[int(0.99 * (len(busy) - 1))],
            busy[-1],
        )
        each_ms = sum(busy) / 1000 / max(1, made)
        shown = "".join(f"{figure:12.0f}" for figure in figures)
        print(f"{count:12}{made:12}{shown}{each_ms:12.1f}", flush=True)


if __name__ == "__main__":
    main()
