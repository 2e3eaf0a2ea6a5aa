"""Whether pauses and moves change a token: the same greedy requests to two servers.

The second pauses and moves requests at random, whatever its policy says (`chaos` and
`force_migration` of its configuration), so that a few seconds of load meet every path. A third of
the requests end by a stop token: a scheduler learns of that a step late, when the next step already
runs.
"""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.arms import STOCK_ON_CPU, Arm, Plan, serve
from evals.load import auth, remote
from evals.load.server import ArmError

CONCURRENCY = 24
REQUEST_TIMEOUT_S = 120.0
REST_TIMEOUT_S = 30.0
# Every request is moved at the end of its thinking; pauses and more moves come by chance per step.
FORCED = {"policy": "pascal", "quantum_tokens": 50, "chaos": 0.02, "force_migration": 0.02}
INSTANCES = 2
# Token ids of letters, as the tiny model writes them: each is as likely as 63 others.
LETTERS = range(64, 90)


@dataclass(frozen=True, slots=True)
class Identity:
    """What came of it.

    stopped: requests that ended by a stop token. different: places of requests whose tokens differ.
    pauses: by tier. moves: ended, by outcome. errors: passes in which the policy failed. costs: of
    copies and prefills as each instance measured them, in seconds. left: KV entries that did not
    come back.
    """

    requests: int
    tokens: int
    stopped: int
    different: list[int]
    pauses: dict[str, int]
    migrations: dict[str, int]
    errors: int
    left: int
    costs: list[dict[str, float | None]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """No token differs, nothing stayed behind, and pauses on the device and to the host, moves
        and early ends really happened."""
        paused = self.pauses.get("resident", 0) and self.pauses.get("host", 0)
        happened = paused and self.migrations.get("moved", 0) and self.stopped
        return bool(happened) and not (self.different or self.errors or self.left)


def bodies(count: int, processor: str) -> list[dict[str, Any]]:
    """Requests that think for 3 to 80 tokens, some with a beginning in common, some with stop
    tokens."""
    dice = random.Random(5)
    made = []
    for i in range(count):
        prompt = "a beginning that others share " * (i % 4) + f"Q{i} " + "x" * dice.randint(0, 60)
        sampling = {
            "temperature": 0,
            "ignore_eos": True,
            "max_new_tokens": dice.randint(90, 160),
            "custom_params": {"thinking_budget": dice.randint(3, 80)},
        }
        if i % 3 == 1:
            # SGLang looks for stop tokens only where the end of a turn counts too.
            sampling |= {"ignore_eos": False, "stop_token_ids": dice.sample(LETTERS, 2)}
        made.append(
            {
                "text": prompt,
                "require_reasoning": True,
                "custom_logit_processor": processor,
                "sampling_params": sampling,
            }
        )
    return made


def ask(base_url: str, requests: list[dict[str, Any]]) -> list[list[int]]:
    """The output ids of all requests. Raises: ArmError if one fails."""

    def one(body: dict[str, Any]) -> list[int]:
        request = urllib.request.Request(
            f"{base_url}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **auth.headers()},
        )
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as reply:
            ids: list[int] = json.loads(reply.read())["output_ids"]
        return ids

    try:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(one, requests))
    except (OSError, ValueError, KeyError) as error:
        raise ArmError(f"a request failed: {error}") from error


def at_rest(base_url: str) -> list[dict[str, Any]]:
    """The same once nothing runs or is paused. Raises: ArmError if that does not come."""
    deadline = time.monotonic() + REST_TIMEOUT_S
    while time.monotonic() < deadline:
        found = remote.instances(base_url)
        if not any(i["requests"] or i["paused"] for i in found):
            return found
        time.sleep(0.2)
    raise ArmError("the server never came to rest")


def forced(plan: Plan) -> Arm:
    """The server that pauses and moves at random: SGLang's own command under our configuration."""
    env = {"PASCAL_SGLANG_CONFIG": json.dumps(FORCED | {"gpus": 1})}
    if "cpu" in plan.flags:
        env |= STOCK_ON_CPU | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    return Arm(name="forced", command="stock", role="candidate", flags=("--dp-size", "2"), env=env)


def check(plan: Plan, model: Path, processor: str, count: int) -> Identity:
    """Run both servers, one after the other."""
    requests = bodies(count, processor)
    with serve(plan.arms[0], plan, model) as server:
        expected = ask(server.base_url, requests)
    with serve(forced(plan), plan, model) as server:
        seen = ask(server.base_url, requests)
        found = at_rest(server.base_url)
    longest = [body["sampling_params"]["max_new_tokens"] for body in requests]
    stopped = sum(len(ids) < most for ids, most in zip(expected, longest, strict=True))
    return compare(expected, seen, found, stopped)


def compare(
    expected: list[list[int]], seen: list[list[int]], found: list[dict[str, Any]], stopped: int
) -> Identity:
    """`found`: the forced server's instances at rest. stopped: requests that ended before they were
    as long as they might be."""

    def added(counts: list[Mapping[str, int]], *names: str) -> dict[str, int]:
        keys = names or sorted({name for each in counts for name in each})
        return {name: sum(each.get(name, 0) for each in counts) for name in keys}

    kv = [instance["kv_tokens"] for instance in found]
    return Identity(
        requests=len(expected),
        tokens=sum(map(len, expected)),
        stopped=stopped,
        different=[i for i, (a, b) in enumerate(zip(expected, seen, strict=True)) if a != b],
        pauses=added([i["pauses"] for i in found], "resident", "host", "recompute"),
        migrations=added([i["migrations"]["outgoing"] for i in found]),
        errors=sum(i["policy_errors"] for i in found),
        left=sum(each["capacity"] - each["free"] - each["evictable"] + each["host"] for each in kv),
        costs=[i["costs"] for i in found],
    )
