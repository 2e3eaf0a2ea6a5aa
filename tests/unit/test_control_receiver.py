"""Control messages come in with the requests, as often as SGLang's receiver looks for these."""

from types import SimpleNamespace

import pytest
import zmq

from pascal_sglang.engine.migration import control_receiver
from pascal_sglang.engine.migration.control_receiver import PascalRequestReceiver

RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver"


class Socket:
    """Holds messages; empty raises as a real one."""

    def __init__(self, messages):
        self.messages = messages


def take(socket, flags):
    if not socket.messages:
        raise zmq.ZMQError
    return socket.messages.pop(0)


@pytest.fixture
def receiver(monkeypatch):
    parallel = SimpleNamespace(pp_rank=0, attn_tp_rank=0, attn_cp_rank=0)
    monkeypatch.setattr(f"{RECEIVER}.get_parallel", lambda: parallel)
    monkeypatch.setattr(f"{RECEIVER}.sock_recv", take)
    monkeypatch.setattr(control_receiver.clock, "now", lambda: 1.0)

    def make(*, most, skips=False):
        control = [[b"said"]]
        return PascalRequestReceiver(
            recv_from_tokenizer=Socket(["a", "b", "c"]),
            recv_from_rpc=Socket([]),
            recv_skipper=SimpleNamespace(handle=lambda batch: not skips),
            input_blocker=None,
            mm_receiver=None,
            server_args=None,
            model_config=None,
            max_recv_per_poll=most,
            stream_output=lambda *_: None,
            get_last_batch=lambda: None,
            control_receiver=SimpleNamespace(
                receive=lambda: control.pop() if control else [], left=control
            ),
        )

    return make


@pytest.mark.parametrize(("most", "there"), [(-1, ["a", "b", "c"]), (2, ["a", "b"])])
def test_a_poll_takes_as_many_requests_as_sglang_says(receiver, most, there):
    control_batch, *requests = receiver(most=most)._pull_raw_reqs()
    assert control_batch.messages == [b"said"]
    assert requests == there


def test_a_poll_that_sglang_skips_takes_nothing(receiver):
    made = receiver(most=-1, skips=True)
    assert made.recv_requests() == []
    assert made.control_receiver.left == [[b"said"]]
