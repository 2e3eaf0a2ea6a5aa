"""Every control request gets as many replies as there were instances, whoever died when."""

import time

import pytest
import zmq
from sglang.srt.managers import io_struct as io
from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS

from pascal_sglang.cluster import worker_sender
from pascal_sglang.cluster.control_replies import MAX_WAITING, REPLIES, ControlReplies
from pascal_sglang.cluster.loop_errors import LOGGED, LoopErrors
from pascal_sglang.cluster.worker_sender import WorkerSender

# Features that we refuse at start, that ask one instance, or that SGLang has for one instance only.
ELSEWHERE = {
    "AddExternalCorpusReqOutput",
    "AttachHiCacheStorageReqOutput",
    "ClearHiCacheReqOutput",
    "DetachHiCacheStorageReqOutput",
    "GetHiCacheL3LayoutReqOutput",
    "InitWeightsSendGroupForRemoteInstanceReqOutput",
    "ListExternalCorporaReqOutput",
    "PdRoleSwitchReqOutput",
    "RemoveExternalCorpusReqOutput",
    "ScaleElasticEPReqOutput",
    "SendWeightsToRemoteInstanceReqOutput",
}


def flush(**more):
    return io.FlushCacheReqInput(**more)


def replies():
    sent = []
    return sent, ControlReplies(sent.append)


def test_all_that_sglang_waits_for_from_every_instance_has_a_reply():
    waited_for = {spec[1].__name__ for spec in _COMMUNICATOR_SPECS}
    waited_for.add(io.UpdateWeightFromDiskReqOutput.__name__)
    made = {type(reply("Instance 1 is dead.")).__name__ for reply in REPLIES.values()}
    assert made == waited_for - ELSEWHERE


def test_the_living_answer_for_themselves():
    sent, replying = replies()
    replying.sent(flush(), {0, 1}, {})
    replying.sent(io.AbortReq(rid="r"), {0, 1}, {})
    for instance in (0, 1):
        replying.answered(instance, "FlushCacheReqInput")
    assert sent == []
    assert len(replying) == 0


def test_for_the_dead_the_controller_answers_after_all_others():
    """SGLang takes the first reply to a flush for its result."""
    sent, replying = replies()
    replying.sent(flush(http_worker_ipc="ipc://worker"), {0, 2}, {1: "dead"})
    replying.answered(2, "FlushCacheReqInput")
    replying.answered(0, "ProfileReq")
    assert sent == []
    replying.answered(0, "FlushCacheReqInput")
    (reply,) = sent
    assert (reply.success, reply.message) == (True, "Instance 1 is dead.")
    assert reply.http_worker_ipc == "ipc://worker"


def test_who_dies_before_it_has_answered_is_answered_for():
    sent, replying = replies()
    replying.sent(flush(), {0, 1}, {})
    replying.sent(io.GetInternalStateReq(), {0, 1}, {})
    replying.answered(0, "FlushCacheReqInput")
    replying.answered(1, "GetInternalStateReq")
    replying.died(1)
    assert [type(s) for s in sent] == [io.FlushCacheReqOutput], "it has answered the other one"
    replying.died(0)
    assert sent[1].internal_state == {"pascal": {"dp_rank": 0, "dead": True}}
    assert len(replying) == 0


def test_what_nobody_answers_is_forgotten():
    _, replying = replies()
    for _ in range(MAX_WAITING + 5):
        replying.sent(flush(), {0}, {})
    assert len(replying) == MAX_WAITING


@pytest.fixture
def pipe(tmp_path):
    context = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    push.setsockopt(zmq.SNDHWM, 0)
    push.bind(f"ipc://{tmp_path}/pipe")
    yield push, pull, f"ipc://{tmp_path}/pipe"
    context.destroy(linger=0)


def test_an_instance_without_a_peer_is_not_waited_for(pipe):
    """SGLang's own send blocks here: a PUSH socket that binds, and nobody is there."""
    push, pull, address = pipe
    sender = WorkerSender(push)
    for number in range(3):
        sender.send(b"%d" % number)
    assert len(sender) == 3
    pull.connect(address)
    deadline = time.monotonic() + 30
    while sender:
        assert time.monotonic() < deadline
        sender.flush()
    sender.send_pyobj({"an": "object"})
    assert [pull.recv() for _ in range(3)] == [b"0", b"1", b"2"]
    assert pull.recv_pyobj() == {"an": "object"}


def test_what_waits_for_an_instance_is_bounded_and_goes_with_it(pipe, monkeypatch):
    monkeypatch.setattr(worker_sender, "MAX_PENDING", 2)
    sender = WorkerSender(pipe[0])
    for _ in range(3):
        sender.send(b"")
    assert (len(sender), sender.dropped) == (2, 1)
    sender.close()
    sender.send(b"")
    assert (len(sender), sender.dropped) == (0, 4)


def test_errors_are_counted_by_kind_and_the_first_are_logged(caplog):
    errors = LoopErrors()
    for _ in range(LOGGED + 3):
        with errors.kept("placing"):
            raise ValueError("no")
    errors.note("reading", KeyError("k"))
    assert errors.counts == {"placing": LOGGED + 3, "reading": 1}
    assert len(caplog.records) == LOGGED + 1
