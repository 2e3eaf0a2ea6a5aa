"""What observing the running requests of one pass costs."""

from __future__ import annotations

import random
import statistics
import time
from array import array
from types import SimpleNamespace

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.observability.phases import PhaseTracker
from pascal_sglang.engine.request_states import RequestStates
from pascal_sglang.policy.ranking import PassInfo

PASSES = 200
# Passes that are not timed: in these, prompts end and answers begin.
STARTING = 20
THOUGHT, END = 1, 7


def observe_us(running: int, pass_s: float, thinking: float) -> float:
    """Median microseconds in which `PhaseTracker.observe` accounts for a pass of `running` requests
    that get a token each. pass_s: length of a pass; readers take a token in 0.1 s. thinking: the
    share of requests that think; the others answer."""
    dice = random.Random(0)
    config = PascalConfig()
    # The observation needs nothing that a scheduler holds.
    scheduler = SimpleNamespace(
        enable_priority_scheduling=False, spec_algorithm=SpeculativeAlgorithm.NONE
    )
    states = RequestStates(scheduler, config, None, None, None)  # type: ignore[arg-type]
    tracker = PhaseTracker(None, lambda live, _over, _now: states.observe(live))
    reqs = []
    for number in range(running):
        params = SamplingParams(max_new_tokens=1 << 20)
        prompt = array("q", range(200))
        req = Req(str(number), None, prompt, params, stream=True, vocab_size=1 << 10)
        tracker.arrived(req, 0.0)
        states.arrived(req)
        reqs.append(req)
    ends = [None if dice.random() < thinking else dice.randrange(STARTING // 2) for _ in reqs]
    took = []
    for number in range(PASSES):
        now = 1.0 + number * pass_s
        states.pass_info = PassInfo(number, now, pass_s)
        for req, end in zip(reqs, ends, strict=True):
            token = END if number == end else THOUGHT
            req.output_ids.append(token)
            req.update_reasoning_tokens(token, [END])
        began = time.perf_counter()
        tracker.observe(reqs, now)
        took.append((time.perf_counter() - began) * 1e6)
    return statistics.median(took[STARTING:])
