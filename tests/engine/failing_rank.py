"""`sglang` on a late device (`late_device`) of which TP rank 1 has no memory for a few copies at a
time: those that fail together are begun again one by one. Where SGLang has no place for such a
device (before 0.5.23), it is one that copies at once.

Once there is a file of the name in `BREAK_FILE`, the policy of that rank fails, and of no other.
"""

import os
import random
import sys

import torch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.engine.kv.copy_stream import CopyStream
from pascal_sglang.policy.plan import Planner

Copies = CopyStream
if hasattr(Scheduler, "_copy_result_to_cpu"):
    sys.path.insert(0, os.path.dirname(__file__))
    from late_device import LateCopies as Copies

# Copies that are made to measure what one costs.
MEASURED = 12
# The chance that memory runs out, and for how many copies.
RUNS_OUT, COPIES = 0.06, 3

dice = random.Random(1)
sound_run, sound_plan = Copies.run, Planner.plan


def run(stream, copy, locations, *, after_steps):
    stream.asked = getattr(stream, "asked", 0) + 1
    stream.failing = getattr(stream, "failing", 0)
    if get_parallel().tp_rank == 1 and stream.asked > MEASURED:
        if not stream.failing and dice.random() < RUNS_OUT:
            stream.failing = COPIES
        if stream.failing:
            stream.failing -= 1
            raise torch.OutOfMemoryError("no memory, on purpose")
    return sound_run(stream, copy, locations, after_steps=after_steps)


def plan(planner, *arguments, **named):
    if get_parallel().tp_rank == 1 and os.path.exists(os.environ["BREAK_FILE"]):
        raise ZeroDivisionError("alone, on purpose")
    return sound_plan(planner, *arguments, **named)


Copies.run, Planner.plan = run, plan

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
