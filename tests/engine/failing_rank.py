"""`sglang` on a late device (`late_device`) of which TP rank 1 has no memory for one copy in ten.

Once there is a file of the name in `BREAK_FILE`, the policy of that rank fails, and of no other.
"""

import os
import random
import sys

import torch
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.policy.plan import Planner

sys.path.insert(0, os.path.dirname(__file__))
from late_device import LateCopies

# Copies that are made to measure what one costs.
MEASURED = 12

dice = random.Random(1)
sound_run, sound_plan = LateCopies.run, Planner.plan


def run(stream, copy, locations, *, after_steps):
    stream.begun = getattr(stream, "begun", 0) + 1
    if get_parallel().tp_rank == 1 and stream.begun > MEASURED and dice.random() < 0.1:
        raise torch.OutOfMemoryError("no memory, on purpose")
    return sound_run(stream, copy, locations, after_steps=after_steps)


def plan(planner, *arguments, **named):
    if get_parallel().tp_rank == 1 and os.path.exists(os.environ["BREAK_FILE"]):
        raise ZeroDivisionError("alone, on purpose")
    return sound_plan(planner, *arguments, **named)


LateCopies.run, Planner.plan = run, plan

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
