"""Processes of a server die, one after the other: each takes along only what it had, and is shown.

One server serves the whole file, in this order, with one instance less after each death.
"""

import json
import re
import time
import urllib.error
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.engine.operations import operate
from tests.engine.test_migration import alive, at_rest, nothing_left, total
from tests.requests import chat, generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the server keeps its temporary files, and nobody else does."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="module")
def server(serve, folder):
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0", "TMPDIR": str(folder)}
    with serve({"force_migration": 0.05}, ["--dp-size", "3"], **binding) as server:
        yield server


def health(server):
    """Status code and the states of the instances."""
    try:
        return 200, server.get("/health?instances=1")["instances"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["instances"]


def becomes(server, states):
    """Wait until the instances are in these states."""
    deadline = time.monotonic() + 60
    while (seen := health(server))[1] != states:
        assert time.monotonic() < deadline, seen
    assert seen[0] == (200 if set(states) == {"live"} else 503)


def counted(server):
    """The metric of instances, by state."""
    series = re.findall(r'^pascal:instances{.*state="(\w+)".*} (.*)$', server.get("/metrics"), re.M)
    return {state: float(number) for state, number in series}


def instance(server, index):
    """The process of a live instance."""
    (pid,) = (i["pid"] for i in alive(server) if i["dp_rank"] == index)
    return psutil.Process(pid)


def detokenizer(server):
    """The launching process has two children of note; the other one starts the instances."""
    controller = instance(server, 0).parent()
    children = psutil.Process(server.process.pid).children()
    (found,) = (
        p for p in children if p != controller and "resource_tracker" not in "".join(p.cmdline())
    )
    return found


def test_a_silent_instance_is_shown_and_a_dead_one_too(server):
    becomes(server, ["live"] * 3)
    stopped = instance(server, 1)
    stopped.suspend()
    try:
        becomes(server, ["live", "silent", "live"])
        states = server.instances()
        assert [i.get("silent", False) for i in states] == [False, True, False]
        assert server.get("/pascal/status")["controller"]["silent"] == [1]
    finally:
        stopped.resume()
    becomes(server, ["live"] * 3)
    assert [i["dp_rank"] for i in at_rest(server)] == [0, 1, 2]


def ask(server, body):
    """The answer's ids; or the status and the text of an error."""
    try:
        return server.post("/generate", body)["output_ids"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def kill(server):
    instance(server, 1).kill()
    return []


def poison(server):
    """A logit processor that raises, which ends a scheduler."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    class Raises(CustomLogitProcessor):
        def __call__(self, logits, custom_params=None):
            raise ZeroDivisionError("on purpose")

    Raises.__module__ = "__main__"  # So that it travels by value.
    body = generate("poison", think=None, total=9, routed_dp_rank=2)
    return [ask(server, {**body, "custom_logit_processor": Raises.to_str()})]


def takes_only_its_own_along(server, number, death):
    """The instance's requests end with a clear error, all others with the tokens they should have;
    those before it are dead already."""
    at_rest(server)
    bodies = [
        generate(f"{death.__name__} {i}", think=20 + i, total=300, rid=uuid.uuid4().hex)
        for i in range(24)
    ]
    # Somebody is on the instance that dies, however late that is: a session does not move.
    stays = generate("stays", 6000, 6010, session_id=death.__name__, routed_dp_rank=number)
    before = total(at_rest(server), "incoming", "taken")
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        stays = pool.submit(ask, server, stays)
        replies = [pool.submit(ask, server, body) for body in bodies]
        deadline = time.monotonic() + 60
        while total(alive(server), "incoming", "taken") == before:
            assert time.monotonic() < deadline
        failed = death(server)
        replies = [reply.result() for reply in replies]
    assert isinstance(stays.result(), tuple), "it was not on the instance that died"
    failed += [r for r in (stays.result(), *replies) if isinstance(r, tuple)]
    whole = {i: r for i, r in enumerate(replies) if not isinstance(r, tuple)}
    assert whole, "nobody was on another one"
    for code, text in failed:
        assert code == 503
        assert "has died" in text
    again = [{**bodies[i], "rid": uuid.uuid4().hex} for i in whole]
    with ThreadPoolExecutor(len(again)) as pool:
        assert list(pool.map(lambda body: ask(server, body), again)) == list(whole.values())
    status = server.get("/pascal/status")
    dead = list(range(1, number + 1))
    assert status["controller"]["dead"] == dead
    assert [i["dp_rank"] for i in status["instances"] if i.get("dead")] == dead
    nothing_left(at_rest(server))
    assert server.process.poll() is None


@pytest.mark.parametrize(("number", "death"), [(1, kill), (2, poison)])
def test_an_instance_takes_only_its_own_requests_along(number, death, server):
    takes_only_its_own_along(server, number, death)
    becomes(server, ["live", "dead", "dead" if number == 2 else "live"])
    deadline = time.monotonic() + 60
    while counted(server) != {"live": 3 - number, "silent": 0, "dead": number}:
        assert time.monotonic() < deadline, counted(server)
        time.sleep(0.2)


def test_what_is_asked_of_a_dead_instance_is_answered(server, tiny_model):
    code, text = ask(server, generate("for nobody", 3, 8, routed_dp_rank=1))
    assert (code, "Instance 1 has died." in text) == (503, True)
    for path, body in (
        ("/flush_cache", {}),
        ("/update_weights_from_disk", {"model_path": str(tiny_model)}),
        ("/update_weight_version", {"new_version": "2"}),
    ):
        operate(server, path, **body)
    assert len(ask(server, generate("for the last one", 3, 8))) == 8


def last_words(server, path, body):
    """Status and text of an error, or the last event of a stream."""
    try:
        if body.get("stream"):
            return 200, json.dumps(server.stream(path, body)[-1])
        return 200, json.dumps(server.post(path, body))
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_dead_detokenizer_ends_the_server(server, folder):
    """It answers everybody, says which process it was, and leaves nothing behind."""
    at_rest(server)
    jobs = []
    for i in range(4):
        stream = {"stream": True} if i % 2 else {}
        jobs.append(("/generate", {**generate(f"cut {i}", 6, 6000), **stream}))
        jobs.append(("/v1/chat/completions", {**chat(f"cut {i}", 6, 6000), **stream}))
    with ThreadPoolExecutor(len(jobs)) as pool:
        replies = [pool.submit(last_words, server, *job) for job in jobs]
        victim = detokenizer(server)
        maps = Path(f"/proc/{instance(server, 0).pid}/maps").read_text()
        shared = set(re.findall(r"/dev/shm/sglang_loads\S*", maps))
        assert shared
        deadline = time.monotonic() + 60
        while sum(len(i["requests"]) for i in alive(server)) < len(jobs):
            assert time.monotonic() < deadline
        victim.kill()
        for (_, body), reply in zip(jobs, replies, strict=True):
            code, text = reply.result()
            assert code == (200 if body.get("stream") else 503)
            assert "The server ends: detokenizer" in text
    assert server.process.wait(60) == 1
    assert server.wait_gone() == []
    assert "pascal_sglang: error: detokenizer" in server.output
    assert list(folder.glob("pascal-*")) == []
    assert [path for path in shared if Path(path).exists()] == []
