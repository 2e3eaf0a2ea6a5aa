"""One soak of one server: learn, warm up, load, rest."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from evals.load import auth, remote
from evals.soak import checks
from evals.soak.bodies import Body
from evals.soak.findings import Findings
from evals.soak.load import Load
from evals.soak.operations import LOOKED_AT, Operator

LEARN_CONCURRENCY = 8
# Shares of the time: the warm-up does everything once that the load does again; and the load is not
# left out on a machine that is slow to learn.
WARM_SHARE = 0.3
LEAST_SHARE = 0.5
# Seconds after the death of an instance within which its server knows.
KNOWN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """kill: the instance that is killed halfway through the load, or None. root: process id of the
    server, None where its processes cannot be seen. operations: by name, before a death and after
    one. model: the folder of the weights that are loaded again."""

    base_url: str
    seconds: float
    concurrency: int
    seed: int
    bodies: Sequence[Body]
    operations: Sequence[str]
    after_death: Sequence[str] = ()
    kill: int | None = None
    root: int | None = None
    model: str = ""


@dataclass(slots=True)
class Soak:
    """What came of it, for the table and for JSON."""

    findings: Findings = field(default_factory=Findings)
    figures: dict[str, Any] = field(default_factory=dict)


def soak(task: Task) -> Soak:
    """Run it. The server is left as it is."""
    return asyncio.run(_soak(task))


async def _soak(task: Task) -> Soak:
    done, dice = Soak(), random.Random(task.seed)
    told = remote.get(task.base_url, "/pascal/status") is not None
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        task.base_url,
        connector=connector,
        headers=auth.headers(),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        load = Load(session, task.bodies, done.findings, tells_status=told)
        paths = [p for p in LOOKED_AT if remote.get(task.base_url, p) is not None]
        operator = Operator(load, task.base_url, task.model, paths)
        earlier = checks.ended(_status(task)) if told else 0
        began = time.perf_counter()
        await load.learn(LEARN_CONCURRENCY)
        learned = time.perf_counter() - began
        left = max(LEAST_SHARE * task.seconds, task.seconds - learned)
        warm = WARM_SHARE * left
        await _both(task, load, operator, warm, dice)
        before = await _at_rest(task, told)
        if task.kill is None:
            await _both(task, load, operator, left - warm, dice)
        else:
            await _with_death(task, load, operator, left - warm, dice)
        after = await _at_rest(task, told)
        checks.compare(before, after, done.findings)
        if told:
            _judge_status(task, load, earlier, done)
        await operator.flush_at_rest()
    done.figures |= {
        "seconds": {"learn": round(learned, 1), "load": round(left, 1)},
        "requests": {kind: asdict(tally) for kind, tally in sorted(load.tallies.items())},
        "fates": dict(load.fates),
        "tokens": load.tokens,
        "operations": {
            name: {"times": times, "slowest_s": round(operator.slowest_s[name], 2)}
            for name, times in operator.done.items()
        },
        "processes": {name: _span(before.get(name), now) for name, now in after.items()},
    }
    return done


def _judge_status(task: Task, load: Load, earlier: int, done: Soak) -> None:
    """What the server says of itself at rest. earlier: how many had ended before the soak."""
    status = _status(task)
    dead = [] if task.kill is None else [task.kill]
    checks.status_at_rest(status, dead, done.findings)
    loads = json.loads(remote.get(task.base_url, "/v1/loads") or "{}")
    checks.loads_at_rest(loads, dead, done.findings)
    ended = checks.ended(status) - earlier
    if task.kill is None and not load.answered <= ended <= load.asked:
        what = f"{ended} ended, {load.answered} answered, {load.asked} asked for"
        done.findings.add("ended not once", what)
    done.figures["pauses"] = checks.pauses(status)


def _span(before: checks.Held | None, now: checks.Held) -> dict[str, Any]:
    """What a process held when warm and holds at the end."""
    was = before or now
    return {
        "files": [was.files, now.files],
        "threads": [was.threads, now.threads],
        "mib": [was.memory >> 20, now.memory >> 20],
        "shared": [len(was.shared), len(now.shared)],
    }


def _status(task: Task) -> dict[str, Any]:
    told = remote.get(task.base_url, "/pascal/status")
    status: dict[str, Any] = json.loads(told or '{"instances": []}')
    return status


async def _both(
    task: Task, load: Load, operator: Operator, seconds: float, dice: random.Random
) -> None:
    """The load and its operator, for so many seconds."""
    await asyncio.gather(
        load.run(seconds, task.concurrency, dice), operator.run(task.operations, seconds, dice)
    )


async def _with_death(
    task: Task, load: Load, operator: Operator, seconds: float, dice: random.Random
) -> None:
    """An instance is killed halfway; the others go on, and an operator goes on with them."""
    assert task.root is not None
    running = asyncio.create_task(load.run(seconds, task.concurrency, dice))
    await operator.run(task.operations, seconds / 2, dice)
    victims = [
        process
        for name, process in checks.processes(task.root).items()
        if re.match(rf"scheduler_DP{task.kill}(?!\d)", name)
    ]
    if not victims:
        load.findings.add("instances", f"no process of instance {task.kill} to kill")
    load.killed = True
    for process in victims:
        process.send_signal(signal.SIGKILL)
    if victims and load.tells_status:
        await _until_known(task)
    load.gone_at = time.perf_counter()
    await operator.run(task.after_death, seconds / 2, dice)
    await running


async def _until_known(task: Task) -> None:
    """Until the server says that an instance has died, which a busy machine makes late; `KNOWN_S`
    seconds at most."""
    deadline = time.perf_counter() + KNOWN_S
    while time.perf_counter() < deadline:
        status = await asyncio.to_thread(_status, task)
        if any(i["dp_rank"] == task.kill and i.get("dead") for i in status["instances"]):
            return
        await asyncio.sleep(0.1)


async def _at_rest(task: Task, told: bool) -> dict[str, checks.Held]:
    """What the processes hold once everything has ended."""
    if told:
        await asyncio.to_thread(checks.wait_for_rest, task.base_url)
    # What a reply leaves to be done after it: a closed connection, a freed buffer.
    await asyncio.sleep(1.0)
    return {} if task.root is None else checks.held(task.root)
