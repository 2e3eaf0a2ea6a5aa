"""Called in every pass of a scheduler of `bed.run`: writes what ran, as one line of JSON each."""

import json

MARK = "WATCH "


def batches(scheduler, reqs, passes):
    """The batch of the pass before."""
    from sglang.srt.managers import schedule_policy

    batch = scheduler.last_batch
    if batch is None:
        return
    mode = batch.forward_mode
    line = {
        "pass": passes,
        "prefill": mode.is_extend(),
        "rids": sorted(req.rid for req in batch.reqs),
        "tokens": int(batch.extend_num_tokens or 0) if mode.is_extend() else 0,
        "running": len(scheduler.running_batch.reqs),
        "waiting": [req.rid for req in scheduler.waiting_queue],
        # Tokens that a prefill keeps for what a request may still write.
        "reserved": schedule_policy.CLIP_MAX_NEW_TOKENS,
        # Passes for which SGLang's delayer has put a prefill off.
        "delayed": _delayed(scheduler.prefill_delayer),
    }
    print(MARK + json.dumps(line))


def _delayed(delayer):
    state = None if delayer is None else delayer._curr_state
    return 0 if state is None else state.delayed_count


def retracting(scheduler, reqs, passes):
    """SGLang's own test of retractions, as by `SGLANG_TEST_RETRACT`,
    `SGLANG_TEST_RETRACT_INTERVAL` and `SGLANG_TEST_RETRACT_NO_PREFILL_BS`; it reads these on
    import, which is long past."""
    from sglang.srt.managers import scheduler as module

    module.TEST_RETRACT = True
    module.TEST_RETRACT_INTERVAL = 3
    module.TEST_RETRACT_NO_PREFILL_BS = 12
    batches(scheduler, reqs, passes)


def forecasts(scheduler, reqs, passes):
    """Every outlook; the next one begins in the pass after, however long the last one took."""
    made = scheduler.plan_executor.forecasts
    made._next_at = 0.0
    if made.outlook is None or getattr(scheduler, "last_outlook", None) is made.outlook:
        return
    scheduler.last_outlook = made.outlook
    ranges = [list(each) for each in made.outlook.requests.values()]
    line = {"pass": passes, "ranges": ranges, "waits_s": made.outlook.arrival.waits_s}
    print(MARK + json.dumps(line))


def arrivals(scheduler, reqs, passes):
    """How many requests forecasts go by."""
    arrived = scheduler.plan_executor.forecasts.forecaster.arrivals
    print(MARK + json.dumps({"pass": passes, "arrived": arrived._count}))


def lines(outcome):
    """What was written, in order."""
    found = [line for line in outcome.log.splitlines() if line.startswith(MARK)]
    return [json.loads(line.removeprefix(MARK)) for line in found]
