"""Every control request gets as many replies as there were instances, whoever died when."""

import asyncio
import copy
import time
from types import SimpleNamespace

import pytest
import zmq
from sglang.srt.managers import io_struct as io
from sglang.srt.managers import tokenizer_control_mixin
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS, TokenizerControlMixin
from sglang.srt.speculative.external_corpus_manager import ExternalCorpusManager

from pascal_sglang.cluster import worker_sender
from pascal_sglang.cluster.control_replies import (
    MAX_WAITING,
    REPLIES,
    ControlReplies,
    reply_for,
)
from pascal_sglang.cluster.loop_errors import LOGGED, LoopErrors
from pascal_sglang.cluster.worker_sender import WorkerSender
from pascal_sglang.engine import scheduler as scheduler_module
from pascal_sglang.engine.scheduler import PascalScheduler
from pascal_sglang.entrypoints import http_server

# SGLang asks them of one instance, or the death of an instance ends a server that has them.
ELSEWHERE = {
    "InitWeightsSendGroupForRemoteInstanceReqOutput",
    "PdRoleSwitchReqOutput",
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


BOUND_S = 5
LAYOUT = {"enabled": True, "page_size": 64, "hicache_object_layout": {"pools": ["kv"]}}


class Manager(TokenizerControlMixin):
    """SGLang's side of two instances. living: the reply of the one that is alive."""

    def __init__(self, living):
        self.living = living
        self.communicator = FanOutCommunicator(self.send, 2)

    def __getattr__(self, name):
        assert name.endswith("_communicator"), name
        return self.communicator

    def auto_create_handle_loop(self):
        """The test hands replies over itself."""

    def record_config_updates(self, *_, **__):
        """Of the server's arguments, which this one does not have."""

    def send(self, request):
        asyncio.get_running_loop().call_soon(self.reply, type(request))

    def reply(self, kind):
        self.communicator.handle_recv(self.living)
        self.communicator.handle_recv(reply_for(kind, 1, "dead"))


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize(
    ("name", "arguments", "reply", "more"),
    [
        ("clear_hicache_storage", (), io.ClearHiCacheReqOutput, {}),
        ("attach_hicache_storage", ("file",), io.AttachHiCacheStorageReqOutput, {}),
        ("detach_hicache_storage", (), io.DetachHiCacheStorageReqOutput, {}),
        (
            "add_external_corpus",
            (io.AddExternalCorpusReqInput(corpus_id="c", documents=[""]),),
            io.AddExternalCorpusReqOutput,
            {"corpus_id": "c", "loaded_token_count": 3},
        ),
        ("remove_external_corpus", ("c",), io.RemoveExternalCorpusReqOutput, {}),
        (
            "list_external_corpora",
            (),
            io.ListExternalCorporaReqOutput,
            {"corpus_token_counts": {"c": 3}},
        ),
    ],
)
def test_the_result_is_that_of_the_living(monkeypatch, name, arguments, reply, more, success):
    spec = SimpleNamespace(
        speculative_algorithm="NGRAM", speculative_ngram_external_corpus_max_tokens=9
    )
    monkeypatch.setattr(tokenizer_control_mixin, "get_spec", lambda: spec)
    manager = Manager(reply(success=success, **more))
    asked = getattr(manager, name)(*copy.deepcopy(arguments))
    found = asyncio.run(asyncio.wait_for(asked, BOUND_S))
    assert found.success is success
    if success:
        assert {field: getattr(found, field) for field in more} == more


@pytest.mark.skipif(
    not hasattr(io, "GetHiCacheL3LayoutReq"), reason="SGLang has no such request here"
)
def test_the_layout_of_the_cache_is_that_of_the_living():
    """SGLang calls layouts that differ inconsistent."""
    from sglang.srt.mem_cache.hicache_storage import merge_l3_layouts

    manager = Manager(io.GetHiCacheL3LayoutReqOutput(layout=LAYOUT))
    asked = http_server.living_layouts(Manager.get_hicache_l3_cache_layout, manager)
    assert merge_l3_layouts(asyncio.run(asyncio.wait_for(asked, BOUND_S))) == LAYOUT


def test_a_corpus_that_has_been_loaded_is_answered_like_any_control_request(monkeypatch):
    """SGLang answers it past `send_control_output`, by which the controller learns of answers."""
    monkeypatch.setattr(Scheduler, "init_invariant_checker", lambda _: None)
    monkeypatch.setattr(scheduler_module, "build_executor", lambda *_: (None, None))
    worker = SimpleNamespace(add_external_corpus=lambda *_: 3, commit_corpus_load=lambda *_: None)
    scheduler = PascalScheduler.__new__(PascalScheduler)
    scheduler.pascal_config = scheduler.support = None
    scheduler.external_corpus_manager = ExternalCorpusManager(worker, lambda *_: None)
    answered = []
    scheduler.send_control_output = lambda output, request: answered.append((output, request))
    scheduler.init_invariant_checker()
    asked = io.AddExternalCorpusReqInput(corpus_id="c", token_chunks=[[1]])
    assert scheduler.external_corpus_manager.add(asked) is None
    scheduler.external_corpus_manager._pending_load[1].join()
    scheduler.external_corpus_manager.check_pending_load()
    ((output, request),) = answered
    assert (output.loaded_token_count, request) == (3, asked)
