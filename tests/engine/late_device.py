"""`sglang` on a device that is as late as CUDA allows.

- What a step hands to the next one (`FutureMap.stash` on the forward stream) lands when the next
  step begins, or when the result of that step is read.
- A copy of KV between device and host memory lands when it is waited for, or when a step begins
  that was told to wait for it, and takes all copies before it along. Asked whether it is complete,
  it may land, sooner on one rank than on another.

What is written on the scheduler's own stream lands at once. Rows of requests that have ended are
handed out first: a step in flight may still write there. The server says so once per process when
it does and a request that comes back has got the row. Worker processes import the main module, so
this holds in all of them.
"""

import functools
import random
import sys
from collections import deque

from sglang.srt.managers import scheduler as sglang_scheduler
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.engine.kv import host_copies
from pascal_sglang.engine.kv.copy_stream import CopyStream

# How often a copy lands when it is asked whether it has.
LANDS = 0.4
SAME_ROW = "A STEP IN FLIGHT AND A REQUEST THAT COMES BACK WRITE THE SAME ROW"


@functools.cache
def dice():
    """Other ones on each rank."""
    parallel = get_parallel()
    return random.Random(100 * parallel.pp_rank + parallel.tp_rank)


class Stream:
    """Work that is done in order, and no earlier than somebody needs it."""

    def __init__(self):
        self.later, self.begun, self.done = deque(), 0, 0

    def add(self, work):
        """Returns the place that `land` takes."""
        self.later.append(work)
        self.begun += 1
        return self.begun

    def land(self, place):
        while self.done < place:
            self.done += 1
            self.later.popleft()()


class Steps(Stream):
    """The forward stream; as a context, what is launched inside belongs to it."""

    inside = stepping = said = False

    def __init__(self):
        super().__init__()
        self.rows = deque()

    def __enter__(self):
        self.inside = True

    def __exit__(self, *_):
        self.inside = self.stepping = False

    def stash(self, sound, rows, stash):
        """`rows` of the map, written by a step or by whoever else."""
        if self.stepping:
            self.rows.append((self.add(stash), rows))
            return
        late = {row for place, those in self.rows if place > self.done for row in those.tolist()}
        if not self.said and late.intersection(rows.tolist()):
            self.said = True
            print(SAME_ROW, file=sys.stderr, flush=True)
        if self.inside:
            self.add(stash)
        else:
            stash()

    def land(self, place):
        super().land(place)
        while self.rows and self.rows[0][0] <= self.done:
            self.rows.popleft()


class Done:
    """The event after which a copy is complete."""

    def __init__(self, stream, copy):
        self.stream, self.copy, self.error = stream, copy, None
        self.place = stream.add(self.land)

    def land(self):
        try:
            self.copy()
        except RuntimeError as error:
            self.error = error
        del self.copy

    def query(self):
        if self.stream.done < self.place and dice().random() < LANDS:
            self.stream.land(self.place)
        if self.error is not None:
            raise self.error
        return self.stream.done >= self.place

    def synchronize(self):
        self.stream.land(self.place)
        if self.error is not None:
            raise self.error


class LateCopies(CopyStream):
    deferred = True

    def __init__(self):
        self.copies = Stream()

    def run(self, copy, locations, *, after_steps):
        return Done(self.copies, copy)

    def hold_steps(self, done):
        steps.add(done.synchronize)


steps = Steps()
sound_begin, sound_stash = sglang_scheduler.resolve_forward_inputs, FutureMap.stash
sound_init, sound_copy = Scheduler.init_overlap, Scheduler._copy_result_to_cpu
sound_process, sound_free = Scheduler.process_batch_result, ReqToTokenPool.free


def begin(batch, future_map):
    steps.land(steps.begun)
    steps.stepping = steps.inside
    return sound_begin(batch, future_map)


def stash(future_map, rows, payload):
    steps.stash(sound_stash, rows, functools.partial(sound_stash, future_map, rows, payload))


def init_overlap(scheduler):
    sound_init(scheduler)
    if scheduler.enable_overlap:
        scheduler.forward_stream_ctx = steps


def copy_result(scheduler, result, batch):
    sound_copy(scheduler, result, batch)
    result.late_place = steps.begun


def process(scheduler, batch, result):
    steps.land(getattr(result, "late_place", 0))
    return sound_process(scheduler, batch, result)


def free(pool, req):
    sound_free(pool, req)
    if not req.finished():
        # Rows are taken from the end.
        pool.free_slots.insert(0, pool.free_slots.pop())


sglang_scheduler.resolve_forward_inputs, FutureMap.stash = begin, stash
ReqToTokenPool.free = free
Scheduler.init_overlap, Scheduler._copy_result_to_cpu = init_overlap, copy_result
Scheduler.process_batch_result = process
host_copies.copy_stream_of = lambda scheduler: LateCopies()

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
