"""Time-outs of a replay that expire when a test says so, and not before."""

import asyncio

SKIPPED_S = 100.0


def run(what, records, skip=None):
    """What the coroutine returns, which fills in the records. skip: when this holds of them, the
    clock that time-outs go by goes on by `SKIPPED_S`."""

    async def go():
        skipping = asyncio.create_task(_skip_when(records, skip or (lambda _: False)))
        try:
            return await what
        finally:
            skipping.cancel()

    # SGLang's loop, which is the usual one once it is imported, has a clock that cannot be set.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(go())


async def _skip_when(records, holds):
    loop = asyncio.get_running_loop()
    now = loop.time
    while not (records and holds(records)):
        await asyncio.sleep(0.01)
    loop.time = lambda: now() + SKIPPED_S
