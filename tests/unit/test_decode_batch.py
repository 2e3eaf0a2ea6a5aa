"""The last token of a request that comes back reaches the next step after whatever the step in
flight still writes."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from pascal_sglang.engine.kv import decode_batch


class Tensor:
    """On a device with streams."""

    device = torch.device("meta")

    def __init__(self, name, said):
        self.name, self.said = name, said

    def record_stream(self, stream):
        self.said.append((self.name, stream.name))


class Device:
    """Streams, and what happens on them in order."""

    def __init__(self, monkeypatch, *, overlap, drafts=False):
        self.said, self.inside = [], "schedule"
        schedule = SimpleNamespace(name="schedule")
        monkeypatch.setattr(
            torch, "get_device_module", lambda _: SimpleNamespace(current_stream=lambda: schedule)
        )
        waits = lambda other: self.said.append(("forward waits for", other.name))  # noqa: E731
        self.scheduler = SimpleNamespace(
            enable_overlap=overlap,
            forward_stream=SimpleNamespace(name="forward", wait_stream=waits),
            forward_stream_ctx=self.forward(),
            future_map=SimpleNamespace(stash=self.stash, publish=self.publish),
            spec_algorithm=SimpleNamespace(is_some=lambda: drafts),
        )
        self.batch = SimpleNamespace(
            req_pool_indices=Tensor("rows", self.said), seq_lens=Tensor("lengths", self.said)
        )

    @contextmanager
    def forward(self):
        self.inside = "forward"
        yield
        self.inside = "schedule"

    def relay(self, *fields):
        state = {field: Tensor(field, self.said) for field in fields}
        decode_batch._relay(self.batch, state, self.scheduler)

    def publish(self, rows, lengths):
        self.said.append(("publish", rows.name, lengths.name, self.inside))

    def stash(self, rows, payload):
        self.said.append(("stash", rows.name, payload.bonus_tokens.name, self.inside))


def test_under_overlap_it_is_written_in_the_order_of_steps(monkeypatch):
    device = Device(monkeypatch, overlap=True)
    device.relay("bonus_tokens")
    assert device.said == [
        ("forward waits for", "schedule"),
        ("stash", "rows", "bonus_tokens", "forward"),
        ("rows", "forward"),
        ("bonus_tokens", "forward"),
    ]


def test_with_drafts_lengths_are_written_too(monkeypatch):
    """After the step in flight, which says how long its own requests are."""
    device = Device(monkeypatch, overlap=True, drafts=True)
    device.relay("bonus_tokens", "topk_index")
    assert device.said == [
        ("forward waits for", "schedule"),
        ("stash", "rows", "bonus_tokens", "forward"),
        ("publish", "rows", "lengths", "forward"),
        ("rows", "forward"),
        ("bonus_tokens", "forward"),
        ("topk_index", "forward"),
        ("lengths", "forward"),
    ]


def test_without_overlap_there_is_one_stream(monkeypatch):
    device = Device(monkeypatch, overlap=False)
    device.relay("bonus_tokens")
    assert device.said == [("stash", "rows", "bonus_tokens", "schedule")]
