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
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from evals.arms import Arm, Plan
from evals.gpu.servers import two_instances
from evals.load import auth, remote
from evals.load.server import ArmError

CONCURRENCY = 24
REQUEST_TIMEOUT_S = 120.0
REST_TIMEOUT_S = 30.0
# Every request is moved at the end of its thinking; pauses and more moves come by chance per step.
FORCED = {"policy": "pascal", "quantum_tokens": 50, "chaos": 0.02, "force_migration": 0.02}
TIERS = ("resident", "host", "recompute")
# One request in so many streams and is aborted after that many tokens.
ABORTED, TOKENS_BEFORE_ABORT = 12, 8
# Token ids of letters, as the tiny model writes them: each is as likely as 63 others.
LETTERS = range(64, 90)


@dataclass(frozen=True, slots=True)
class Identity:
    """What came of it.

    stopped, aborted: requests that ended by a stop token or an abort, paused and moved as they
    were. different: places of requests whose tokens differ. unsteady: of those whose tokens differ
    without us, by the order of requests alone. pauses: by tier. migrations: ended, by outcome.
    errors: passes in which the policy failed. left: KV entries that did not come back. costs: of
    copies and prefills as each instance measured them, in seconds.
    """

    requests: int
    tokens: int
    stopped: int
    aborted: int
    different: list[int]
    unsteady: list[int]
    pauses: dict[str, int]
    migrations: dict[str, int]
    errors: int
    left: int
    costs: list[dict[str, float | None]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """No token differs, nothing stayed behind, and pauses of every kind, moves, aborts and
        early ends really happened."""
        happened = (
            *self.pauses.values(),
            *(self.migrations.get("moved", 0), self.stopped, self.aborted),
        )
        return all(happened) and not (self.different or self.errors or self.left)


def bodies(count: int, processor: str, *, shared: bool) -> list[dict[str, Any]]:
    """Requests that think for 3 to 80 tokens, a third of them with stop tokens, one in twelve to be
    aborted. shared: whether some have a beginning in common."""
    dice = random.Random(5)
    made = []
    for i in range(count):
        beginning = "a beginning that others share " * (i % 4) if shared else ""
        prompt = beginning + f"Q{i} " + "x" * dice.randint(0, 60)
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
                "rid": f"{i}-{uuid.uuid4().hex}",
                "require_reasoning": True,
                "custom_logit_processor": processor,
                "sampling_params": sampling,
                # Only a stream tells when it may be aborted.
                "stream": i % ABORTED == 3,
            }
        )
    return made


@dataclass(frozen=True, slots=True)
class Reply:
    """ids: the output of a request that went to its end; None of one that was aborted."""

    ids: list[int] | None
    reason: str


def ask(base_url: str, requests: Sequence[Mapping[str, Any]], timeout_s: float) -> list[Reply]:
    """The replies to all requests. Those that stream are aborted after a few tokens. Raises:
    ArmError if one fails, or takes longer than `timeout_s`."""

    def one(body: Mapping[str, Any]) -> Reply:
        request = _post(base_url, "/generate", body)
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            if not body["stream"]:
                told = json.loads(reply.read())
            else:
                told = None
                for number, event in enumerate(_events(reply)):
                    told = event
                    if number == TOKENS_BEFORE_ABORT:
                        abort = _post(base_url, "/abort_request", {"rid": body["rid"]})
                        urllib.request.urlopen(abort, timeout=timeout_s).close()
            reason = str(told["meta_info"]["finish_reason"]["type"])
            return Reply(None if reason == "abort" else told["output_ids"], reason)

    try:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(one, requests))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArmError(f"a request failed: {error!r}") from error


def _post(base_url: str, path: str, body: Mapping[str, Any]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json", **auth.headers()}
    return urllib.request.Request(f"{base_url}{path}", json.dumps(body).encode(), headers)


def _events(reply: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """What a stream says, event by event."""
    for line in reply:
        data = line.decode().strip().removeprefix("data: ")
        if data.startswith("{"):
            yield json.loads(data)


def at_rest(base_url: str) -> list[dict[str, Any]]:
    """What the instances say once nothing runs or is paused. Raises: ArmError if that does not
    come."""
    deadline = time.monotonic() + REST_TIMEOUT_S
    while time.monotonic() < deadline:
        found = remote.instances(base_url)
        if not any(i["requests"] or i["paused"] for i in found):
            return found
        time.sleep(0.2)
    raise ArmError("the server never came to rest")


def forced(plan: Plan) -> Arm:
    """The server that pauses and moves at random."""
    return two_instances("forced", plan, FORCED)


def check(stock: str, forced: str, requests: list[dict[str, Any]], left_s: float) -> Identity:
    """Send the requests to both servers, and to the first once more in another order: what differs
    there already is not the scheduler's doing. left_s: seconds that all of it may take."""
    deadline = time.monotonic() + min(left_s, REQUEST_TIMEOUT_S)

    def asked(base_url: str, some: Sequence[dict[str, Any]]) -> list[Reply]:
        # A name may be used once.
        named = [body | {"rid": f"{uuid.uuid4().hex}-{body['rid']}"} for body in some]
        return ask(base_url, named, max(1.0, deadline - time.monotonic()))

    expected = asked(stock, requests)
    before = at_rest(forced)
    seen = asked(forced, requests)
    found = at_rest(forced)
    again = asked(stock, requests[::-1])[::-1]
    return compare(expected, seen, again, before, found)


def compare(
    expected: Sequence[Reply],
    seen: Sequence[Reply],
    again: Sequence[Reply],
    before: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
) -> Identity:
    """again: the first server's replies to the same requests in another order. before, found: the
    forced server's instances at rest, before it was asked and afterwards."""

    def added(read: Callable[[Mapping[str, Any]], Mapping[str, int]]) -> dict[str, int]:
        total = Counter[str]()
        for counts in map(read, found):
            total.update(counts)
        for counts in map(read, before):
            total.subtract(counts)
        return dict(total)

    def apart(others: Sequence[Reply]) -> list[int]:
        pairs = enumerate(zip(expected, others, strict=True))
        return [i for i, (a, b) in pairs if a.ids and b.ids and a.ids != b.ids]

    pauses = added(lambda i: i["pauses"])
    kv = [instance["kv_tokens"] for instance in found]
    return Identity(
        requests=len(expected),
        tokens=sum(len(reply.ids or ()) for reply in expected),
        stopped=sum(reply.reason == "stop" for reply in seen),
        aborted=sum(reply.reason == "abort" for reply in seen),
        different=apart(seen),
        unsteady=apart(again),
        pauses={tier: pauses.get(tier, 0) for tier in TIERS},
        migrations=added(lambda i: i["migrations"]["outgoing"]),
        errors=sum(i["policy_errors"] for i in found),
        left=sum(each["capacity"] - each["free"] - each["evictable"] + each["host"] for each in kv),
        costs=[dict(i["costs"]) for i in found],
    )
