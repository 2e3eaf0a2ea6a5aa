"""The last token of a request that comes back reaches the next step after whatever the step in
flight still writes."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
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

    def __init__(self, monkeypatch, *, overlap):
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
            future_map=SimpleNamespace(stash=self.stash),
        )

    @contextmanager
    def forward(self):
        self.inside = "forward"
        yield
        self.inside = "schedule"

    def stash(self, rows, payload):
        self.said.append(("stash", rows.name, payload.bonus_tokens.name, self.inside))


@pytest.fixture
def device(request, monkeypatch):
    return Device(monkeypatch, overlap=request.param)


@pytest.mark.parametrize("device", [True], indirect=True)
def test_under_overlap_it_is_written_in_the_order_of_steps(device):
    rows, last = Tensor("rows", device.said), Tensor("last", device.said)
    decode_batch._relay(rows, last, device.scheduler)
    assert device.said == [
        ("forward waits for", "schedule"),
        ("stash", "rows", "last", "forward"),
        ("rows", "forward"),
        ("last", "forward"),
    ]


@pytest.mark.parametrize("device", [False], indirect=True)
def test_without_overlap_there_is_one_stream(device):
    rows, last = Tensor("rows", device.said), Tensor("last", device.said)
    decode_batch._relay(rows, last, device.scheduler)
    assert device.said == [("stash", "rows", "last", "schedule")]
