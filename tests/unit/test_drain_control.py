"""Our controller drains an instance: what it says to whom. Instances are mere sockets."""

import asyncio
import time
from array import array

import pytest

from pascal_sglang.cluster import drains
from pascal_sglang.cluster.control_channel import (
    CONTROLLER,
    FRONT_END,
    ControlReceiver,
    ControlSender,
)
from pascal_sglang.cluster.messages import (
    DrainCommand,
    DrainReply,
    InstanceDown,
    LocationQuery,
    MayEnd,
    MigrationEnded,
    RequestFinished,
    Terminating,
    TurnElsewhere,
)
from pascal_sglang.cluster.prefix_index import block_names
from pascal_sglang.entrypoints.drain_routes import Asked, ControllerLine, asked_in
from pascal_sglang.policy.prefix_namespace import Namespace
from tests.unit import test_watched_controller
from tests.unit.test_watched_controller import BOUND_S, request

scene = test_watched_controller.scene


class Side:
    """An instance's control sockets."""

    def __init__(self, scene, index):
        place = scene.controller.control_receiver.place
        self.index, self.inbox = index, ControlReceiver(place, index, 2)
        self.sender = ControlSender(place, index)
        self.found = []

    def say(self, message):
        self.sender.send(CONTROLLER, message)

    def hear(self, kind):
        deadline = time.monotonic() + BOUND_S
        while time.monotonic() < deadline:
            self.found += [self.inbox.read(data)[1] for data in self.inbox.receive()]
            for message in self.found:
                if isinstance(message, kind):
                    self.found.remove(message)
                    return message
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__}")

    def is_quiet(self):
        time.sleep(0.1)
        self.found += [self.inbox.read(data)[1] for data in self.inbox.receive()]
        return [m for m in self.found if not isinstance(m, LocationQuery | InstanceDown)] == []


def wait_until(holds):
    deadline = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(params=[None, "127.0.0.1"], ids=["in a folder", "over TCP"])
def one(scene, request):
    return with_sides(scene(migration="drain", control_listen=request.param))


def with_sides(made):
    made.line = ControllerLine(made.controller.control_receiver.place, 2)
    made.ask = lambda rank, drain=True: asyncio.run(made.line.ask(rank, drain=drain))
    made.sides = [Side(made, index) for index in range(2)]
    return made


@pytest.fixture
def one_that_keeps(scene):
    return with_sides(scene(migration="drain", tool_kv=0.5))


def test_a_drain_is_ordered_told_and_lifted(one, monkeypatch):
    for rid in ("a", "b"):
        one.send(request(rid, routed_dp_rank=1))
        one.hear(one.instances[1])
    reply = one.ask(1)
    assert (reply.problem, reply.progress.state, reply.progress.left) == ("", "draining", 2)
    orders = [one.sides[1].hear(DrainCommand) for _ in range(2)]
    monkeypatch.setattr(drains, "AGAIN_S", 1000.0)
    monkeypatch.setattr(drains, "AGAIN_AT_MOST_S", 1000.0)
    assert sorted(o.rid for o in orders) == ["a", "b"]
    assert {(o.target, o.without_kv) for o in orders} == {(0, False)}
    one.send(request("c"))
    assert one.hear(one.instances[0]).rid == "c"
    one.send(request("d", routed_dp_rank=1))
    ended = one.hear(one.manager)
    assert (ended.rid, ended.finished_reason["status_code"]) == ("d", 503)
    assert ended.finished_reason["message"] == "Instance 1 is drained."
    one.sides[1].say(MigrationEnded(1, orders[0].migration, False, "a session"))
    one.sides[0].say(MigrationEnded(0, orders[1].migration, True, ""))
    wait_until(lambda: (told := one.ask(1).progress).moved and told.kept)
    progress = one.ask(1).progress
    assert (progress.left, progress.moved, progress.kept) == (1, 1, {"a session": 1})
    assert one.controller.describe()["drains"]["1"]["moved"] == 1
    one.controller.drains._drains[1].attempts[orders[0].rid].again_at = float("-inf")
    assert one.sides[1].hear(DrainCommand).rid == orders[0].rid, "it is tried again"
    assert one.ask(0).problem == "Instance 0 is the last one that takes requests."
    assert one.ask(1, drain=False).progress.state == "serving"
    one.send(request("e", routed_dp_rank=1))
    assert one.hear(one.instances[1]).rid == "e"
    assert one.controller.describe()["drains"] == {}
    assert one.controller.errors.counts == {}


def test_who_has_a_turns_prompt_is_told_that_it_went_elsewhere(one_that_keeps):
    """It may keep KV for just this turn. Another request of no common beginning tells nobody."""
    one = one_that_keeps
    spoken = list(range(200))
    one.send(request("a", input_ids=array("q", spoken), routed_dp_rank=1))
    one.hear(one.instances[1])
    one.sides[1].say(RequestFinished(1, "a", list(block_names(spoken, Namespace("b")))))
    wait_until(lambda: len(one.controller.request_locations) == 0)
    turn = {"input_ids": array("q", [*spoken, 7]), "extra_key": "b"}
    one.ask(1)
    one.send(request("c", **turn))
    assert one.hear(one.instances[0]).rid == "c"
    told = one.sides[1].hear(TurnElsewhere)
    assert told.prompt() == (array("q", [*spoken, 7]), Namespace("b"))
    one.ask(1, drain=False)
    one.send(request("d", input_ids=array("q", spoken), extra_key="c", routed_dp_rank=0))
    one.hear(one.instances[0])
    one.send(request("e", **turn, routed_dp_rank=1))
    one.hear(one.instances[1])
    one.sides[1].found.clear()
    assert one.sides[1].is_quiet()
    assert one.sides[0].is_quiet(), "both have it by now"
    assert one.controller.errors.counts == {}


def test_an_instance_that_is_told_to_end_may_when_it_is_empty(one):
    one.send(request("a", routed_dp_rank=1))
    one.hear(one.instances[1])
    one.sides[1].say(Terminating(1, 0))
    one.sides[1].hear(DrainCommand)
    assert one.sides[1].is_quiet()
    one.sides[1].say(RequestFinished(1, "a", []))
    assert one.sides[1].hear(MayEnd) == MayEnd("")
    assert one.sides[1].is_quiet(), "once"
    assert one.ask(1, drain=False).problem == "Instance 1 was told to end, and ends."
    one.sides[0].say(Terminating(0, 0))
    assert "last one" in one.sides[0].hear(MayEnd).problem
    one.processes[1].end(0)
    deadline = time.monotonic() + BOUND_S
    while one.controller._active_workers != [0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert one.thread.is_alive()
    assert one.ask(1).problem == "Instance 1 has died."


def test_a_lifted_drain_takes_back_that_an_instance_was_told_to_end(one):
    """Each of its processes may be told once; the second time is once too many."""
    one.send(request("a", routed_dp_rank=1))
    one.hear(one.instances[1])
    for _ in range(2):
        one.sides[1].say(Terminating(1, 0))
        one.sides[1].say(Terminating(1, 1))
        told = one.controller.drains.told
        wait_until(lambda told=told: told(1) == {0, 1})
        assert one.ask(1).progress.left == 1
        assert one.ask(1, drain=False).problem == ""
    one.sides[1].say(RequestFinished(1, "a", []))
    wait_until(lambda: one.ask(1).progress.state == "drained")
    one.sides[1].hear(DrainCommand)
    assert one.sides[1].is_quiet(), "it is drained, and serves on when that is lifted"
    one.send(request("b", routed_dp_rank=0))
    one.hear(one.instances[0])
    one.sides[0].say(Terminating(0, 0))
    assert "last one" in one.sides[0].hear(MayEnd).problem
    assert one.ask(1, drain=False).problem == ""
    one.sides[0].say(Terminating(0, 1))
    one.sides[0].hear(DrainCommand)
    assert one.sides[0].is_quiet()
    one.sides[0].say(Terminating(0, 1))
    assert one.sides[0].hear(MayEnd) == MayEnd("Instance 0 was told to end before.")


def test_a_drain_is_lifted_when_the_last_other_instance_dies(one, caplog):
    one.ask(1)
    one.kill(0)
    deadline = time.monotonic() + BOUND_S
    while one.controller.drains:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    one.send(request("a"))
    assert one.hear(one.instances[1]).rid == "a"
    assert "instance 1 takes requests again: no other is left" in caplog.text


def test_under_sglangs_balancing_no_instance_is_drained(scene):
    made = scene(placement="sglang")
    line = ControllerLine(made.controller._folder.path, 2)
    reply = asyncio.run(line.ask(1, drain=True))
    assert "SGLang's own balancing" in reply.problem
    assert not made.controller.drains


def test_a_reply_that_comes_too_late_is_dropped(one, monkeypatch):
    line = one.line
    side = one.sides[0]
    progress = one.controller.drains.progress(0, 0.0)
    monkeypatch.setattr("pascal_sglang.entrypoints.drain_routes.ANSWER_S", 0.0)
    monkeypatch.setattr(line._sender, "send", lambda to, asked: True)
    assert asyncio.run(line.ask(0, drain=True)) is None
    side.sender.send(FRONT_END, DrainReply(0, "late", progress))
    side.sender.send(FRONT_END, DrainReply(1, "in time", progress))
    peers = side.inbox._peers  # Over TCP it asks for the address first.
    wait_until(lambda: side.inbox.receive() == [] and not (peers and peers._held))
    monkeypatch.setattr("pascal_sglang.entrypoints.drain_routes.ANSWER_S", BOUND_S)
    assert asyncio.run(line.ask(0, drain=True)).problem == "in time"
    assert line._replies == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "is not JSON"),
        (b"\xff{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"dp_rank":' * 50_000, "is not JSON"),
        (b'{"dp_rank": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"dp_rank": 1}\x00', "is not JSON"),
        (b'\xef\xbb\xbf{"dp_rank": 9}', "from 0 to 1"),
        ('{"dp_rank": 2}'.encode("utf-16"), "from 0 to 1"),
        ('{"dp_rank": 1}'.encode("utf-16")[:-1], "is not JSON"),
        (b'{"\\ud800": 1}', "unknown fields"),
        (b'{"dp_rank": 1e999}', "whole number"),
        (b'{"dp_rank": NaN}', "whole number"),
        (b'{"dp_rank": 1' + b"0" * 400 + b"}", "from 0 to 1"),
        (b'{"dp_rank": [1]}', "whole number"),
        (b"[0]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"dp_rank": 2}', "from 0 to 1"),
        (b'{"dp_rank": -1}', "from 0 to 1"),
        (b'{"dp_rank": true}', "whole number"),
        (b'{"dp_rank": 1.0}', "whole number"),
        (b'{"dp_rank": "1"}', "whole number"),
        (b'{"dp_rank": null}', "whole number"),
        (b'{"dp_rank": 0, "dp_rank": 1}', "'dp_rank' twice"),
        (b'{"dp_rank": 1, "now": 2}', "unknown fields: 'now'"),
        (b'{"rank": 1}', "unknown fields: 'rank'"),
        (b'{"dp_rank": 1, "notice_s": 2}', "for the whole server"),
        (b'{"notice_s": -1}', "a number from 0 to 3600"),
        (b'{"notice_s": 3601}', "a number from 0 to 3600"),
        (b'{"notice_s": NaN}', "a number from 0 to 3600"),
        (b'{"notice_s": -Infinity}', "a number from 0 to 3600"),
        (b'{"notice_s": 1' + b"0" * 400 + b"}", "a number from 0 to 3600"),
        (b'{"notice_s": true}', "a number from 0 to 3600"),
        (b'{"notice_s": "5"}', "a number from 0 to 3600"),
    ],
)
def test_what_names_nothing_to_drain_is_refused_in_one_line(body, says):
    with pytest.raises(ValueError, match=says) as refused:
        asked_in(body, 2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (b'{"dp_rank": 1}', Asked(dp_rank=1)),
        (b"", Asked()),
        (b"{}", Asked()),
        (b'{"notice_s": 0}', Asked(notice_s=0)),
        (b'{"notice_s": 2.5}', Asked(notice_s=2.5)),
    ],
)
def test_an_instance_is_named_by_its_rank_and_the_server_by_nothing(body, asked):
    assert asked_in(body, 2) == asked
