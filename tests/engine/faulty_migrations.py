"""`sglang` with a bad network between instances, and a slow pipe behind one of them.

Messages are lost, repeated and late; ends of requests are not told; requests that came cannot be
taken over. What instance 0 sends to the detokenizer comes a while later, in order; the detokenizer
writes down whenever it had to hold something back, and whenever it let something pass out of order.
Worker processes import the main module, so this holds in all of them.
"""

import pickle
import queue
import random
import sys
import threading
import time

from pascal_sglang.cluster.control_channel import ControlReceiver, ControlSender
from pascal_sglang.cluster.messages import Message, RequestFinished
from pascal_sglang.cluster.migration_source import Terms
from pascal_sglang.cluster.output_order import OutputOrder
from pascal_sglang.entrypoints import detokenizer

# Longer than most moves take on a busy machine, and far shorter than the detokenizer's patience.
PIPE_DELAY_S = 1.0
dice = random.Random(4)
sound_send, sound_admit, sound_handle = ControlSender.send, OutputOrder.admit, detokenizer._handle
seen = {}


def send(control_sender, to, message):
    if isinstance(message, RequestFinished) and dice.random() < 0.2:
        return True
    if not isinstance(message, Message):
        return sound_send(control_sender, to, message)
    fate = dice.random()
    if fate < 0.06:
        return True
    if fate < 0.10:
        sound_send(control_sender, to, message)
    if 0.10 <= fate < 0.14:
        late = threading.Timer(0.1, lambda: control_sender.late.append((to, message)))
        late.daemon = True
        late.start()
        return True
    while control_sender.late:
        sound_send(control_sender, *control_sender.late.pop())
    return sound_send(control_sender, to, message)


def admit(order, instance, message, rows, now):
    passed = sound_admit(order, instance, message, rows, now)
    if not passed:
        print("HELD BACK", file=sys.stderr, flush=True)
    return passed


def handle(manager, message):
    for row in detokenizer.rows_of(message) if hasattr(message, "completion_tokens") else ():
        if row.begin > seen.get(row.rid, 0):
            print("OUT OF ORDER", row, file=sys.stderr, flush=True)
        seen[row.rid] = row.end
    sound_handle(manager, message)


class Envelope:
    """Takes what SGLang would send, by whichever of its ways."""

    def send(self, data, flags=0):
        self.data = data

    def send_pyobj(self, value, flags=0, protocol=-1):
        self.data = pickle.dumps(value, protocol)


class SlowSender:
    """Around a `SenderWrapper`: the same, `PIPE_DELAY_S` later, in order."""

    def __init__(self, sender):
        self.sender, self.queue = sender, queue.Queue()
        threading.Thread(target=self.deliver, daemon=True).start()

    def send_output(self, output, recv_obj=None):
        from sglang.srt.managers.io_struct import sock_send

        envelope = Envelope()
        sock_send(envelope, output)  # As it is now: the requests in it go on changing.
        self.queue.put((time.monotonic() + PIPE_DELAY_S, envelope.data))

    def deliver(self):
        while True:
            due, data = self.queue.get()
            time.sleep(max(0.0, due - time.monotonic()))
            self.sender.socket.send(data)


def open_box(control_receiver, folder, name, instances):
    sound_open(control_receiver, folder, name, instances)
    if name == 0:
        slow_down_this_instance()
    if name in (0, 1):
        fail_to_adopt()


def slow_down_this_instance():
    from pascal_sglang.engine.scheduler import PascalScheduler

    sound = PascalScheduler.init_output_streamer

    def init_output_streamer(scheduler):
        sound(scheduler)
        streamer = scheduler.output_streamer
        streamer.send_to_detokenizer = SlowSender(streamer.send_to_detokenizer)

    PascalScheduler.init_output_streamer = init_output_streamer


def fail_to_adopt():
    """Before the request has its KV, or after."""
    from pascal_sglang.engine.kv.paused import PausedRequests

    sound_adopt = PausedRequests.adopt

    def adopt(paused_requests, *args):
        fate = dice.random()
        if fate < 0.1:
            raise RuntimeError("a request cannot be adopted, for this test")
        sound_adopt(paused_requests, *args)
        if fate < 0.2:
            raise RuntimeError("adopting a request has failed, for this test")

    PausedRequests.adopt = adopt


sound_open = ControlReceiver.__init__
ControlReceiver.__init__, OutputOrder.admit, detokenizer._handle = open_box, admit, handle
ControlSender.late, ControlSender.send = [], send
# Shorter than a request of the load lasts, so that waiting in vain is seen.
Terms.__init__.__kwdefaults__["patience_s"] = 0.5

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
