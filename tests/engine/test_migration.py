"""Requests that move at the end of their thinking, and again at random: no token changes, none is
lost, nothing stays behind. Streams, stop strings and aborts are those of `tests.engine.load`."""

import json
import os
import random
import signal
import socket
import sys
import threading
import time
import urllib.error
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from pascal_sglang.engine.migration.receive_buffer import SLOTS
from pascal_sglang.request_ids import MAX_ID
from tests.doors import check
from tests.engine.conftest import LATE, SERVE
from tests.engine.inproc.conftest import arms
from tests.engine.load import LETTERS, abort, bodies, run
from tests.engine.odds import assert_same, odds
from tests.engine.operations import call
from tests.requests import generate

FLOOD = {"force_migration": 0.02}
FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_migrations.py")), "serve")

ARMS = {
    # With chaos, half of the copies count as begun in one pass and complete in the next.
    "two ranks each, pauses, a late device": (
        40,
        LATE,
        ["--tp-size", "2"],
        {"chaos": 0.02, "quantum_tokens": 50},
    ),
    # As between hosts.
    "mooncake and TCP, no overlap, pages of 16": (
        60,
        SERVE,
        ["--disable-overlap-schedule", "--page-size", "16"],
        {"kv_transport": "mooncake", "control_listen": "127.0.0.1"},
    ),
}


def differences(whole, reference):
    return [i for i, (a, b) in enumerate(zip(whole, reference, strict=False)) if a != b]


def alive(server):
    return [i for i in server.instances() if not i.get("dead")]


def silent(instances):
    """Whether one shows nothing of itself, which has stood still for seconds."""
    return any(i.get("silent") for i in instances)


def at_rest(server):
    """The instances once nothing runs, waits, is paused or moves."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        instances = alive(server)
        if not silent(instances):
            moving = [m["out"] + m["in"] for i in instances if (m := i["migrations"]) is not None]
            if not any([*moving, *(i["requests"] or i["paused"] for i in instances)]):
                return instances
        time.sleep(0.05)
    raise AssertionError(f"never came to rest: {instances}")


def nothing_left(instances):
    for instance in instances:
        migrations = instance["migrations"]
        assert migrations is None or migrations["awaiting_token"] == 0
        kv = instance["kv_tokens"]
        assert (kv["free"] + kv["evictable"], kv["host"]) == (kv["capacity"], 0)
        assert (instance["policy_errors"], instance["queue_errors"]) == (0, 0)


def controller(server, moved):
    """What the controller shows, once it has heard of all moves; it shows twice a second."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        shown = server.get("/pascal/status")["controller"]
        if shown["migrations"].get("moved", 0) == moved and not shown["live_requests"]:
            return shown
        time.sleep(0.05)
    raise AssertionError(f"the controller knows of something else than {moved} moves: {shown}")


def wait_for(server, holds):
    """Poll the status until what is looked for is there."""
    deadline = time.monotonic() + 60
    while silent((shown := server.get("/pascal/status"))["instances"]) or not holds(shown):
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)
    return shown


def all_is_given_back(shown):
    """No slot may still be written into, and the controller knows of no request."""
    slots = [i["migrations"]["slots"] for i in shown["instances"]]
    in_doubt = sum(s["in_doubt"] for s in slots)
    return (
        not in_doubt
        and all(s["free"] == SLOTS for s in slots)
        and not shown["controller"]["live_requests"]
    )


def total(instances, way, *outcomes):
    return sum(i["migrations"][way].get(o, 0) for i in instances for o in outcomes)


def drained(server, rank):
    """The progress of a drain, once nothing is left; and that nothing is."""

    def instance(shown):
        (found,) = (i for i in shown["instances"] if i["dp_rank"] == rank)
        return found

    def is_empty(shown):
        # Instances are asked before the controller, which shows itself once in a while.
        drain = shown["controller"]["drains"].get(str(rank), {})
        here = instance(shown)
        return drain.get("state") == "drained" and not (here["requests"] or here["paused"])

    shown = wait_for(server, is_empty)
    nothing_left([instance(shown)])
    return shown["controller"]["drains"][str(rank)]


def names_on(shown, *ranks):
    """The requests on these instances; a dead one has none."""
    here = [i for i in shown["instances"] if i["dp_rank"] in ranks]
    return {r["rid"] for i in here for r in i.get("requests", ())}


@contextmanager
def thinkers(server, rank, count=1, total=4000, **more):
    """Requests that are on that instance when the block begins, and think until it is over: they
    are there however long something takes. Yields their replies by their names."""
    made = [
        generate(
            "One that thinks on and on.",
            None,
            total,
            rid=uuid.uuid4().hex,
            require_reasoning=True,
            routed_dp_rank=rank,
            **more,
        )
        for _ in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        replies = {b["rid"]: pool.submit(server.post, "/generate", b, 300) for b in made}
        try:
            wait_for(server, lambda shown: replies.keys() <= names_on(shown, rank))
            yield replies
        finally:
            while left := [rid for rid, reply in replies.items() if not reply.done()]:
                for rid in left:
                    abort(server, rid)
                wait([replies[rid] for rid in left], timeout=0.2)


def with_a_drain(server, work):
    """What the work came to, in whose middle an instance is drained, and serves again."""
    with ThreadPoolExecutor(1) as pool:
        with thinkers(server, 1, total=1000):
            job = pool.submit(work)
            wait_for(server, lambda shown: len(names_on(shown, 1)) > 5 or job.done())
            assert server.post("/pascal/drain", {"dp_rank": 1})["left"] > 0
            progress = drained(server, 1)
            assert server.post("/pascal/undrain", {"dp_rank": 1})["state"] == "serving"
            assert progress["moved"] > 0, "they ended where they were: this shows nothing"
        return job.result()


def flood(server, count, reference):
    """The load with everybody moving, and an instance that is drained: nothing of that shows in
    what comes back, nor afterwards."""
    whole, _ = with_a_drain(server, lambda: run(server, count))
    instances = at_rest(server)
    moved = total(instances, "outgoing", "moved")
    shown = controller(server, moved)
    metrics = server.get("/metrics")
    assert differences(whole, reference) == []
    nothing_left(instances)
    assert moved > count / 3
    assert moved == total(instances, "incoming", "taken")
    assert all(i["migrations"]["rejected"] == {} for i in instances)
    breaks = [b for i in instances for ended in i["recent"] for b in ended["breaks"]]
    assert sum(kind == "moved" for kind, _, _ in breaks) > count / 6
    assert all(0 < start <= end for _, start, end in breaks)
    assert (shown["rejected"], shown["dead"], shown["silent"]) == ({}, [], [])
    for series in (
        "pascal:migrations_total{",
        "pascal:migrated_bytes_total",
        "pascal:migration_blocking_seconds_bucket",
        "pascal:boundary_decisions_total{",
    ):
        assert series in metrics


@pytest.mark.parametrize("arm", arms(ARMS))
def test_a_flood_of_moves_is_invisible(arm, serve, reference, stock_server):
    count, command, flags, settings = ARMS[arm]
    mooncake = settings.get("kv_transport") == "mooncake"
    if mooncake:
        pytest.importorskip("mooncake.engine", exc_type=ImportError)
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0|1"}
    with serve({**FLOOD, **settings}, ["--dp-size", "2", *flags], command, **binding) as server:
        flood(server, count, reference)
        if mooncake:
            assert check(server) >= {"Mooncake", "Control messages over TCP"}
        if "chaos" in settings:
            # Prefilled again where they went, and prompts' log probabilities not collected again.
            assert_same(odds(server, 24), odds(stock_server, 24))
            nothing_left(at_rest(server))


def test_lost_late_and_repeated_messages_and_a_slow_pipe(serve, reference):
    """Moves fail and their requests go on; what overtakes in the pipes waits in the detokenizer.
    Long ones move all the while."""
    with serve(FLOOD, ["--dp-size", "2"], FAULTY) as server, ThreadPoolExecutor(6) as pool:
        long = [
            pool.submit(server.post, "/generate", generate("on", 6, 900, rid=uuid.uuid4().hex), 300)
            for _ in range(6)
        ]
        whole, _ = run(server, 60)
        assert len({tuple(reply.result()["output_ids"]) for reply in long}) == 1
        instances = at_rest(server)
        shown = wait_for(server, all_is_given_back)
        output = server.output
    assert shown["controller"]["forgotten"] > 0, "every end was heard of: this shows nothing"
    assert differences(whole, reference) == []
    nothing_left(instances)
    assert total(instances, "outgoing", "moved") > 20
    waited = total(instances, "outgoing", "kept:timeout") + total(instances, "incoming", "timeout")
    assert waited > 0, "nobody waited in vain: nothing was lost"
    failed = total(instances, "incoming", "failed")
    assert failed > 0, "all that came was taken over"
    assert "cannot be adopted, for this test" in output
    assert "has failed, for this test" in output
    assert "HELD BACK" in output, "the pipes were never out of order: this shows nothing"
    assert "OUT OF ORDER" not in output


def disconnect(server, body, tokens):
    """Read a stream up to `tokens` tokens and hang up."""
    data = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(head.encode() + data)
        seen = b""
        while seen.count(b"data: ") < tokens:
            got = client.recv(1 << 16)
            assert got, seen[-500:]
            seen += got


@pytest.fixture(scope="module")
def flooded(serve):
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}
    settings = {"force_migration": 0.05, "drain_on_term": True}
    # Room for those that think on and on, and the others.
    flags = ["--dp-size", "3", "--max-total-tokens", "16384"]
    with serve(settings, flags, LATE, **binding) as server:
        yield server
        server.stop(signal.SIGTERM)


def test_a_flood_of_moves_among_three_is_invisible(flooded, reference):
    flood(flooded, 60, reference)


def test_who_hangs_up_at_any_point_of_a_move_leaves_nothing(flooded):
    """Right after the boundary, where a move has just begun, and ever later."""
    before = sum(i["ended"].get("aborted", 0) for i in at_rest(flooded))
    jobs = [
        (generate(f"hang up {i}", think=6, total=6000, rid=uuid.uuid4().hex), 8 + i)
        for i in range(24)
    ]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda job: disconnect(flooded, *job), jobs))
    instances = at_rest(flooded)
    nothing_left(instances)
    assert sum(i["ended"].get("aborted", 0) for i in instances) == before + len(jobs)
    assert total(instances, "outgoing", "moved") > 0


def test_moves_open_no_wider_way_in_than_the_docs_say(flooded):
    assert check(flooded) >= {"KV receive buffer", "Control messages"}


def test_what_cannot_travel_stays_and_says_why(flooded):
    flooded.post("/generate", generate("stay", think=6, total=40, session_id="s"))
    unmovable = [i["migrations"]["unmovable"] for i in at_rest(flooded)]
    assert {reason for counts in unmovable for reason in counts} >= {"a session"}
    assert flooded.get("/pascal/status")["support"] == {"level": "move", "lowered_by": []}


def test_penalties_and_grammars_travel(flooded):
    """One body has one answer, wherever and however often it goes on: each instance counts what
    the others have written, and follows it with a grammar of its own."""
    kinds = (
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.6},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 100, "stop_token_ids": [*LETTERS], "ignore_eos": False},
        {"regex": "[a-f]{150}"},
    )
    before = total(at_rest(flooded), "outgoing", "moved")

    def answer(job):
        i, params = job
        body = generate(f"kind {i}", think=6, total=120, rid=uuid.uuid4().hex)
        body["sampling_params"] |= params
        return i, tuple(flooded.post("/generate", body)["output_ids"])

    with ThreadPoolExecutor(15) as pool:
        answers = set(pool.map(answer, [*enumerate(kinds)] * 6))
    assert sorted(i for i, _ in answers) == [*range(len(kinds))]
    instances = at_rest(flooded)
    assert total(instances, "outgoing", "moved") > before + 10
    unmovable = {reason for i in instances for reason in i["migrations"]["unmovable"]}
    assert unmovable <= {"a session", "its end"}
    nothing_left(instances)


def test_an_id_of_any_allowed_length_travels(flooded):
    before = total(at_rest(flooded), "outgoing", "moved")
    rids = [uuid.uuid4().hex.ljust(MAX_ID, "\x01é"[i % 2]) for i in range(4)]
    for rid in rids:
        flooded.post("/generate", generate("a long name", think=4, total=120, rid=rid))
    assert total(at_rest(flooded), "outgoing", "moved") > before
    shown = wait_for(flooded, lambda shown: not shown["controller"]["live_requests"])
    assert shown["controller"]["rejected"] == {}


def test_log_probabilities_travel(flooded):
    """All of them, in one piece, whichever instance made them."""
    for stream in (False, True):
        body = generate("odds", think=4, total=120, return_logprob=True, top_logprobs_num=2)
        reply = flooded.stream("/generate", body)[-1] if stream else flooded.post("/generate", body)
        meta = reply["meta_info"]
        assert len(meta["output_token_logprobs"]) == len(reply["output_ids"]) == 120
        assert [t for _, t, _ in meta["output_token_logprobs"]] == reply["output_ids"]
        assert len(meta["output_top_logprobs"]) == 120


def test_the_next_turn_goes_where_the_last_one_ended(flooded):
    """A conversation that was moved away is continued where it went, not where it began."""
    at_rest(flooded)
    for _ in range(40):
        prompt = f"{uuid.uuid4().hex} tell me a long story " * 20
        first = uuid.uuid4().hex
        flooded.post("/generate", generate(prompt, 3, 70, rid=first, routed_dp_rank=0))
        home = flooded.recent(first)["dp_rank"]
        second = uuid.uuid4().hex
        flooded.post("/generate", generate(prompt + " and then", None, 1, rid=second))
        assert flooded.recent(second)["dp_rank"] == home
        if home:
            return
    raise AssertionError("no conversation was moved")


def burst(server, pool, count, **more):
    """The first of the load's requests, all at once; each ends with its output and why it did."""

    def one(body):
        reply = server.post("/generate", {**body, **more}, timeout=300)
        return reply["output_ids"], reply["meta_info"]["finish_reason"]["type"]

    return [pool.submit(one, body) for body in bodies(count)]


def same(futures, reference):
    both = [(f.result(), whole) for f, whole in zip(futures, reference, strict=False)]
    return [i for i, (found, whole) in enumerate(both) if whole is not None and found != whole]


def in_a_burst(server, pool, count, reference, holds, **more):
    """A burst, once what is looked for is shown in its middle; another one should it end unseen."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        futures = burst(server, pool, count, **more)
        while not all(f.done() for f in futures):
            shown = server.get("/pascal/status")
            if not silent(shown["instances"]) and holds(shown):
                return futures
            time.sleep(0.02)
        assert same(futures, reference) == []
    raise AssertionError("never seen in the middle of a burst")


def refusal(server, path, body):
    """Status and text of an answer that is none."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post(path, body)
    told = json.load(refused.value)
    return refused.value.code, told.get("message") or told["error"]["message"]


def test_a_drain_moves_everything_off_live_and_none_comes_until_it_is_lifted(flooded, reference):
    """Thinking, answering and waiting requests, while the others have their own load."""
    at_rest(flooded)
    count = 90

    def all_kinds(shown):
        here = shown["instances"][1]
        return here["waiting"] and here["running"]["reasoning"] and here["running"]["answering"]

    with ThreadPoolExecutor(count + 1) as pool, thinkers(flooded, 1, 3) as going:
        load = pool.submit(run, flooded, 40)
        futures = in_a_burst(flooded, pool, count, reference, all_kinds, routed_dp_rank=1)
        first = flooded.post("/pascal/drain", {"dp_rank": 1})
        assert (first["dp_rank"], first["state"]) == (1, "draining")
        assert first["left"] >= len(going)
        again = flooded.post("/pascal/drain", {"dp_rank": 1})
        assert again["seconds"] >= first["seconds"]
        progress = drained(flooded, 1)
        wait_for(flooded, lambda shown: going.keys() <= names_on(shown, 0, 2))
        why = "Instance 1 is drained."
        refused = refusal(flooded, "/generate", generate("no", 3, 8, routed_dp_rank=1))
        assert refused == (503, why)
        rid = uuid.uuid4().hex
        flooded.post("/generate", generate("yes", 3, 8, rid=rid))
        assert flooded.recent(rid)["dp_rank"] != 1
        assert same(futures, reference) == []
        assert differences(load.result()[0], reference) == []
    assert progress["moved"] >= len(going)
    assert progress["kept"] == {}
    instances = at_rest(flooded)
    nothing_left(instances)
    ended = [r for i in instances if i["dp_rank"] != 1 for r in i["recent"]]
    moved = {r["rid"] for r in ended if any(kind == "moved" for kind, _, _ in r["breaks"])}
    assert going.keys() <= moved
    assert 'pascal:drain_moves_total{model_name="' in flooded.get("/metrics")
    # The two others.
    assert flooded.post("/pascal/drain", {"dp_rank": 0})["state"] in ("draining", "drained")
    assert refusal(flooded, "/pascal/drain", {"dp_rank": 2}) == (
        409,
        "Instance 2 is the last one that takes requests.",
    )
    assert flooded.post("/pascal/undrain", {"dp_rank": 0})["state"] == "serving"
    assert flooded.post("/pascal/undrain", {"dp_rank": 1})["state"] == "serving"
    before = flooded.get("/pascal/status")["controller"]["placed"].get("1", 0)
    for i in range(6):
        flooded.post("/generate", generate(f"back {i}", 3, 8))
    wait_for(flooded, lambda shown: shown["controller"]["placed"].get("1", 0) > before)


def ten_think_on(rank):
    return lambda shown: shown["instances"][rank]["running"]["reasoning"] > 9


def test_a_drain_that_is_lifted_in_the_middle_loses_nothing(flooded, reference):
    at_rest(flooded)
    with ThreadPoolExecutor(60) as pool:
        futures = in_a_burst(flooded, pool, 60, reference, ten_think_on(0), routed_dp_rank=0)
        flooded.post("/pascal/drain", {"dp_rank": 0})
        aborted = {i for i in range(60) if reference[i] is None}
        for i in aborted:
            abort(flooded, f"{i}-")
        assert flooded.post("/pascal/undrain", {"dp_rank": 0})["state"] == "serving"
        assert same(futures, reference) == []
    nothing_left(at_rest(flooded))


def test_drains_of_everything_at_once_lose_nothing(flooded, reference):
    """Again and again, of instances that there are not, too, and lifted in the middle; requests are
    aborted meanwhile."""
    at_rest(flooded)
    over = threading.Event()

    def operator(seed):
        dice, seen = random.Random(seed), Counter()
        while not over.wait(0.02):
            path = dice.choice(("/pascal/drain", "/pascal/drain", "/pascal/undrain"))
            code, _ = call(flooded, path, {"dp_rank": dice.choice((0, 1, 2, 3, -1, None))})
            seen[code] += 1
        return seen

    with ThreadPoolExecutor(3) as pool:
        operators = [pool.submit(operator, seed) for seed in range(3)]
        try:
            whole, _ = run(flooded, 60)
        finally:
            over.set()
        seen = sum((each.result() for each in operators), Counter())
    for rank in range(3):
        assert flooded.post("/pascal/undrain", {"dp_rank": rank})["state"] == "serving"
    assert seen.keys() == {200, 400, 409}, seen
    assert differences(whole, reference) == []
    nothing_left(at_rest(flooded))
    shown = wait_for(flooded, lambda s: all_is_given_back(s) and not s["controller"]["drains"])
    assert (shown["controller"]["errors"], shown["controller"]["rejected"]) == ({}, {})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"dp_rank": 3}, "dp_rank must be a whole number from 0 to 2"),
        ({"dp_rank": -1}, "dp_rank must be a whole number"),
        ({"dp_rank": True}, "dp_rank must be a whole number"),
        ({"dp_rank": "1"}, "dp_rank must be a whole number"),
        ({"rank": 1}, "unknown fields: 'rank'"),
        ([1], "must be a JSON object"),
        ({"dp_rank": 1, "force": True}, "unknown fields: 'force'"),
    ],
)
def test_a_drain_of_nothing_is_one_clear_refusal(flooded, body, says):
    for path in ("/pascal/drain", "/pascal/undrain"):
        code, text = refusal(flooded, path, body)
        assert code == 400
        assert says in text
    assert flooded.get("/pascal/status")["controller"]["drains"] == {}


def test_an_instance_that_is_told_to_end_is_drained_first(flooded, reference):
    """As a node that is taken away tells it. Its requests go on; then it has ended in order. One
    that cannot move keeps it from ending before."""
    instances = at_rest(flooded)
    taken = total(instances[:2], "incoming", "taken")
    with ThreadPoolExecutor(60) as pool:
        with thinkers(flooded, 2, session_id="s"):
            futures = in_a_burst(flooded, pool, 60, reference, ten_think_on(2), routed_dp_rank=2)
            os.kill(instances[2]["pid"], signal.SIGTERM)
            wait_for(flooded, lambda shown: "2" in shown["controller"]["drains"])
            # It takes that back; the next one is the first again.
            assert flooded.post("/pascal/undrain", {"dp_rank": 2})["state"] == "serving"
            body = generate("back", 3, 8, routed_dp_rank=2)
            assert len(flooded.post("/generate", body)["output_ids"]) == 8
            os.kill(instances[2]["pid"], signal.SIGTERM)
        assert same(futures, reference) == []
    shown = wait_for(flooded, lambda shown: shown["controller"]["dead"] == [2])
    assert total(alive(flooded), "incoming", "taken") > taken
    assert shown["controller"]["drains"] == {}
    assert refusal(flooded, "/pascal/drain", {"dp_rank": 2}) == (409, "Instance 2 has died.")
    nothing_left(at_rest(flooded))


def test_the_death_of_every_target_lifts_a_drain(flooded, reference):
    """In the middle of its moves: what they took goes with them, all else goes on where it was."""
    targets = [i["pid"] for i in alive(flooded) if i["dp_rank"] != 1]
    with (
        ThreadPoolExecutor(60) as pool,
        thinkers(flooded, 1, session_id="s") as stays,
        thinkers(flooded, 1, 3) as going,
    ):
        futures = in_a_burst(flooded, pool, 60, reference, ten_think_on(1), routed_dp_rank=1)
        flooded.post("/pascal/drain", {"dp_rank": 1})
        wait_for(flooded, lambda shown: going.keys() & names_on(shown, 0, 2))
        for pid in targets:
            os.kill(pid, signal.SIGKILL)
        wait_for(flooded, lambda shown: shown["controller"]["dead"] == [0, 2])
        wait_for(flooded, lambda shown: stays.keys() <= names_on(shown, 1))
    ended = [*futures, *going.values()]
    lost = [error for f in ended if (error := f.exception()) is not None]
    assert {error.code for error in lost} == {503}, "nothing was lost: this shows nothing"
    assert all("has died" in error.read().decode() for error in lost)
    whole = [i for i, f in enumerate(futures) if f.exception() is None]
    assert same([futures[i] for i in whole], [reference[i] for i in whole]) == []
    assert flooded.get("/pascal/status")["controller"]["drains"] == {}
    assert flooded.post("/pascal/undrain", {"dp_rank": 1})["state"] == "serving"
    assert len(flooded.post("/generate", generate("on", 3, 8))["output_ids"]) == 8
    nothing_left(at_rest(flooded))


def test_nothing_outlives_the_launching_process(flooded):
    """Last: it is killed. The kernel ends the others, each with its parent."""
    flooded.tree()
    flooded.process.send_signal(signal.SIGKILL)
    assert flooded.wait_gone() == []
