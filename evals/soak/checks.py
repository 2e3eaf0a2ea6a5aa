"""A server at rest: what it says of itself, what its processes hold, what it leaves behind."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from evals.load import remote
from evals.soak.findings import Findings

REST_S = 60.0
# Of the controller's figures, those that are 0 at rest.
UNDER_WAY = ("live_requests", "migrations_under_way")
# What a process may hold at the end beyond what it held when warm: pools of threads and allocators
# fill up over time; what leaks with the requests is far above this after a few minutes.
MORE_FILES, MORE_THREADS = 6, 8
MORE_MEMORY, MORE_MEMORY_SHARE = 48 << 20, 0.06
SHARED = ("/dev/shm/", "/memfd:")
TROUBLE = re.compile(r"Traceback|[Ee]rror|ERROR|CRITICAL|Exception|assert|not flushed")


@dataclass(frozen=True, slots=True)
class Held:
    """One process at rest. memory: resident, in bytes. shared: see `shared_memory`."""

    pid: int
    files: int
    threads: int
    memory: int
    shared: frozenset[str]


def title(process: psutil.Process) -> str:
    """What the process is, as SGLang names it; for others, the last of its command line."""
    words = " ".join(process.cmdline()).split()
    named = [w for w in words if w.startswith("sglang::")]
    if named:
        return named[0].removeprefix("sglang::")
    known = ("multiprocessing", "sglang.", "pascal")
    return next((word for word in words if word.startswith(known)), "other")


def processes(root: int) -> dict[str, psutil.Process]:
    """The live processes of a server, by title and a number where several have one."""
    found: dict[str, psutil.Process] = {}
    try:
        top = psutil.Process(root)
        tree = (top, *top.children(recursive=True))
    except psutil.NoSuchProcess:
        return {}
    for process in tree:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            name = "main" if process.pid == root else title(process)
        except psutil.NoSuchProcess:
            continue
        number = sum(known.split("#")[0] == name for known in found)
        found[f"{name}#{number}" if number else name] = process
    return found


def held(root: int) -> dict[str, Held]:
    """What each process of a server holds now."""
    found = {}
    for name, process in processes(root).items():
        try:
            found[name] = Held(
                process.pid,
                process.num_fds(),
                process.num_threads(),
                process.memory_info().rss,
                shared_memory(process.pid),
            )
        except (psutil.Error, OSError):
            continue
    return found


def shared_memory(pid: int) -> frozenset[str]:
    """Shared memory that a process has mapped, as `inode name`: several have one name."""
    mapped = (line.split(None, 5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return frozenset(
        f"{words[4]} {words[5]}"
        for words in mapped
        if len(words) == 6 and words[5].startswith(SHARED)
    )


def compare(before: Mapping[str, Held], after: Mapping[str, Held], findings: Findings) -> None:
    """Everything is back to what it was. Processes that are gone are not judged."""
    for name, now in after.items():
        was = before.get(name)
        if was is None:
            findings.add("a process more", name)
            continue
        if now.pid != was.pid:
            continue
        if now.files > was.files + MORE_FILES:
            findings.add("descriptors", f"{name}: {was.files} when warm, {now.files} at the end")
        if now.threads > was.threads + MORE_THREADS:
            findings.add("threads", f"{name}: {was.threads} when warm, {now.threads} at the end")
        allowed = max(MORE_MEMORY, MORE_MEMORY_SHARE * was.memory)
        if now.memory > was.memory + allowed:
            mib = f"{was.memory >> 20} MiB when warm, {now.memory >> 20} at the end"
            findings.add("memory", f"{name}: {mib}")
        if more := now.shared - was.shared:
            findings.add("shared memory", f"{name}: {', '.join(sorted(more))} came and stayed")


def wait_for_rest(base_url: str) -> None:
    """Wait until nothing runs, waits, is paused or moves, and the controller, which shows its
    figures now and then, says so too; `REST_S` seconds at most."""
    deadline = time.monotonic() + REST_S
    while time.monotonic() < deadline:
        told = json.loads(remote.get(base_url, "/pascal/status") or "{}")
        found = [i for i in told.get("instances", ()) if not i.get("dead")]
        controller = told.get("controller", {})
        if found and not any(busy(i) for i in found) and not any(map(controller.get, UNDER_WAY)):
            return
        time.sleep(0.3)


def busy(instance: Mapping[str, Any]) -> list[str]:
    """What an instance still has to do, by its own account."""
    migrations = instance["migrations"] or {"in": (), "out": ()}
    found = {
        "requests": [each["rid"] for each in instance["requests"]],
        "paused": instance["paused"],
        "queued": instance["queued"],
        "moves in": migrations["in"],
        "moves out": migrations["out"],
    }
    return [f"{name} {what}" for name, what in found.items() if what]


def status_at_rest(status: Mapping[str, Any], dead: Sequence[int], findings: Findings) -> None:
    """What `/pascal/status` says when nothing is under way. dead: instances that were killed."""
    found = [i["dp_rank"] for i in status["instances"] if i.get("dead")]
    if found != list(dead):
        findings.add("instances", f"dead are {found}, killed were {list(dead)}")
    for instance in status["instances"]:
        if instance.get("dead"):
            continue
        name = f"instance {instance['dp_rank']}"
        for what in busy(instance):
            findings.add("not at rest", f"{name}: {what}")
        kv = instance["kv_tokens"]
        if kv["free"] + kv["evictable"] != kv["capacity"] or kv["host"]:
            findings.add("KV left", f"{name}: {kv}")
        if instance["policy_errors"]:
            findings.add("policy errors", f"{name}: {instance['policy_errors']}")
        if instance["migrations"] and instance["migrations"]["rejected"]:
            findings.add("rejected messages", f"{name}: {instance['migrations']['rejected']}")
        if failed := instance["pauses"].get("copy_failed"):
            findings.add("copies failed", f"{name}: {failed}")
    controller = status.get("controller", {})
    at_rest: dict[str, Any] = {"rejected": {}, "unsent": 0, **dict.fromkeys(UNDER_WAY, 0)}
    for name, value in at_rest.items():
        if controller.get(name, value) != value:
            findings.add("controller", f"{name} {controller[name]}")
    if sorted(controller.get("dead", ())) != list(dead):
        findings.add("controller", f"dead {controller['dead']}")


def loads_at_rest(told: Mapping[str, Any], dead: Sequence[int], findings: Findings) -> None:
    """What `/v1/loads` says to routers when nothing is under way. dead: instances that were killed,
    whose last figures SGLang goes on to show."""
    for load in told.get("loads", ()):
        if load["dp_rank"] in dead:
            continue
        under_way = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs")}
        if any(under_way.values()):
            findings.add("not at rest", f"/v1/loads of instance {load['dp_rank']}: {under_way}")


def ended(status: Mapping[str, Any]) -> int:
    """Requests that have ended, by the instances' account."""
    return sum(sum(i["ended"].values()) for i in status["instances"] if not i.get("dead"))


def pauses(status: Mapping[str, Any]) -> dict[str, int]:
    """Pauses by tier and moves, of all instances that live."""
    found: dict[str, int] = {}
    for instance in status["instances"]:
        counts = instance.get("pauses", {})
        moved = ((instance.get("migrations") or {}).get("outgoing") or {}).get("moved", 0)
        for name in ("resident", "host", "recompute", "spilled"):
            found[name] = found.get(name, 0) + counts.get(name, 0)
        found["moved"] = found.get("moved", 0) + moved
    return found


def trouble(lines: Iterable[str], explained: Sequence[str]) -> list[str]:
    """Lines of a log that speak of errors which nothing explains."""
    known = re.compile("|".join(explained)) if explained else None
    return [
        line.rstrip()
        for line in lines
        if TROUBLE.search(line) and not (known and known.search(line))
    ]
