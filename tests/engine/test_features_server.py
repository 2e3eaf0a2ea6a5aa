"""LoRA adapters, sessions and the hierarchical cache over HTTP, together and with little memory.

Conversations of several turns go on after pauses at random: every token is that of the same server
without any.
"""

import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine import adapters
from tests.engine.inproc.conftest import is_before
from tests.engine.load import settled
from tests.engine.test_pressure import nothing_left
from tests.requests import generate

# Two of each theme: with different adapters, or one with none. So 4 does not divide it.
THEMES = 10
CONVERSATIONS = 2 * THEMES
TURNS = 3
ADAPTERS = (*"abc", None)
UNPINNED = (sys.executable, str(Path(adapters.__file__)), "serve")
CROWDED = {"chaos": 0.05, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
ROOMY = ["--max-total-tokens", "16384"]
TIGHT = ["--max-total-tokens", "1500", "--chunked-prefill-size", "64"]
# Of both servers: what bears on how they read requests, load adapters and keep sessions.
MORE = (
    "--scheduler-recv-interval 3 --lora-drain-wait-threshold 0.2 --enable-lora-overlap-loading "
    "--max-loaded-loras 4 --enable-session-radix-cache"
).split()
POLL = {"SGLANG_SCHEDULER_MAX_RECV_PER_POLL": "2"}
CACHE = (
    "--enable-hierarchical-cache --hicache-io-backend direct --hicache-mem-layout layer_first "
    "--hicache-ratio 8"
).split()
if is_before("0.5.22"):
    CACHE = []  # It takes streams of a CUDA device there.


def converse(server, number):
    """A conversation of its own session, or each third one without: its turns' tokens, and of how
    many tokens their prompts were. The last turn goes on from the first one's answer."""
    session = None
    if number % 3:
        session = server.post("/open_session", {"capacity_of_str_len": 0})
    adapter = ADAPTERS[number % len(ADAPTERS)]
    theme = number % THEMES
    said, asked = [], []
    before = None
    for turn in range(TURNS):
        text = f"Theme {theme}, turn {turn}: " + "so it goes on " * (2 + theme % 3)
        thought = None if (theme + turn) % 3 == 0 else 8 + 2 * theme
        body = generate(text, thought, 40 + 5 * (theme % 5), rid=uuid.uuid4().hex)
        if adapter is not None:
            body["lora_path"] = adapter
        if session is not None:
            body["session_params"] = {"id": session, "rid": before}
        if (number + turn) % 2:
            seen, events = [], server.stream("/generate", body, timeout=300)
            for event in events:
                assert event["output_ids"][: len(seen)] == seen, "a stream took back a token"
                seen = event["output_ids"]
            reply = events[-1]
        else:
            reply = server.post("/generate", body, timeout=300)
        said.append((reply["output_ids"], reply["meta_info"]["finish_reason"]["type"]))
        asked.append(reply["meta_info"]["prompt_tokens"])
        if turn == 0:
            before = body["rid"]
    if session is not None:
        server.post("/close_session", {"session_id": session})
    return said, asked


def converse_all(server):
    with ThreadPoolExecutor(14) as pool:
        return list(pool.map(lambda number: converse(server, number), range(CONVERSATIONS)))


def backed_up(server):
    """The instance at rest, once no copy to the host pool holds a prefix on the device."""
    deadline = time.monotonic() + 30
    while True:
        instance = settled(server)
        kv = instance["kv_tokens"]
        if kv["free"] + kv["evictable"] == kv["capacity"]:
            return instance
        assert time.monotonic() < deadline, kv


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory):
    made = adapters.build(tiny_model, tmp_path_factory.mktemp("lora"))
    return [*adapters.flags(made), *MORE, *CACHE]


def test_pauses_change_no_token_of_a_session_with_an_adapter(serve, flags):
    with serve({"policy": "fcfs"}, [*flags, *ROOMY], UNPINNED, **POLL) as server:
        alone = converse_all(server)
    with serve(CROWDED, [*flags, *TIGHT], UNPINNED, **POLL) as server:
        found = converse_all(server)
        instance = backed_up(server)
        support = server.get("/pascal/status")["support"]
    assert [i for i, (a, b) in enumerate(zip(found, alone, strict=True)) if a != b] == []
    # What was said before is in the prompts of a session alone, and the adapters tell.
    assert [i for i, (_, asked) in enumerate(found) if asked[1] < asked[0] + 30] == [
        *range(0, CONVERSATIONS, 3)
    ]
    opening = [said[0] for said, _ in found]
    assert all(a != b for a, b in zip(opening[:THEMES], opening[THEMES:], strict=True))
    nothing_left(instance)
    assert instance["policy_errors"] == 0
    assert instance["unpausable"] == {}
    pauses = instance["pauses"]
    assert min(pauses.get(tier, 0) for tier in ("resident", "host", "recompute")) > 5, pauses
    assert support["level"] == "pause"
    if CACHE:
        assert "--enable-hierarchical-cache" in support["lowered_by"]
        assert pauses["held_tokens"] > 0
        assert pauses["loaded_prefixes"] > 0
