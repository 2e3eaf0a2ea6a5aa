"""`sglang` whose requests have waited for as long as a test says.

The file `LONG_WAITS` is `RID SECONDS running` or `RID SECONDS waiting`. As soon as that request
runs, or waits while another one runs, it counts as queued so many seconds sooner, and the file
goes. Worker processes import the main module, so this holds in the scheduler.
"""

import os
import sys
from pathlib import Path

from sglang.srt.managers.scheduler import Scheduler

FILE = Path(os.environ["LONG_WAITS"])
sound_poll = Scheduler._poll_timeout_aborts


def poll(scheduler):
    if FILE.exists():
        rid, seconds, status = FILE.read_text().split()
        running = scheduler.running_batch.reqs
        paused = scheduler.plan_executor.paused_requests.paused()
        waiting = [*scheduler.waiting_queue, *paused] if running else []
        for req in running if status == "running" else waiting:
            if req.rid == rid:
                req.time_stats.wait_queue_entry_time -= float(seconds)
                FILE.unlink()
    return sound_poll(scheduler)


Scheduler._poll_timeout_aborts = poll

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
