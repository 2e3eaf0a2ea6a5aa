"""The order in which a device sees copies and steps, on streams that say what they are told."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pascal_sglang.engine.kv.copy_stream import CudaCopyStream


class Device:
    """CUDA as far as streams go."""

    def __init__(self, monkeypatch):
        self.said, self.inside = [], "schedule"
        self.schedule, self.forward = self.stream("schedule"), self.stream("forward")
        monkeypatch.setattr(torch.cuda, "Stream", self.made)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.schedule)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=self.recorded))
        self.priorities = []

    def stream(self, name):
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.said.append((name, "waits for", other.name)),
            wait_event=lambda event: self.said.append((name, "waits for", event)),
            synchronize=lambda: self.said.append((name, "is waited for")),
        )

    def made(self, priority):
        self.priorities.append(priority)
        return self.stream("copies")

    @contextmanager
    def within(self, stream):
        self.inside = stream.name
        try:
            yield
        finally:
            self.inside = "schedule"

    def recorded(self, stream):
        self.said.append((stream.name, "records"))

    def copies(self, *, overlap=True):
        return CudaCopyStream(SimpleNamespace(forward_stream=self.forward, enable_overlap=overlap))

    def run(self, copies, copy=None, *, after_steps=False):
        in_use = SimpleNamespace(
            record_stream=lambda stream: self.said.append(("locations", "in use by", stream.name))
        )
        copy = copy or (lambda: self.said.append((self.inside, "copies")))
        return copies.run(copy, in_use, after_steps=after_steps)


COPIES = [
    ("copies", "waits for", "schedule"),
    ("copies", "copies"),
    ("locations", "in use by", "copies"),
    ("copies", "records"),
]


@pytest.mark.parametrize("after_steps", [True, False])
def test_a_copy_comes_after_what_it_reads(monkeypatch, after_steps):
    device = Device(monkeypatch)
    copies = device.copies()
    assert device.run(copies, after_steps=after_steps) is not None
    steps = [("copies", "waits for", "forward")] if after_steps else []
    assert device.said == [*steps, *COPIES]


def test_the_stream_is_of_a_priority_that_none_of_sglangs_has(monkeypatch):
    """PyTorch gives out streams of one priority more than once."""
    device = Device(monkeypatch)
    device.copies()
    (priority,) = device.priorities
    assert priority < 0


@pytest.mark.parametrize(("overlap", "reader"), [(True, "forward"), (False, "schedule")])
def test_steps_wait_for_a_copy_and_under_overlap_the_scheduler_does_not(
    monkeypatch, overlap, reader
):
    device = Device(monkeypatch)
    device.copies(overlap=overlap).hold_steps("done")
    assert device.said == [(reader, "waits for", "done")]


def test_no_part_of_a_copy_that_fails_is_under_way(monkeypatch):
    device = Device(monkeypatch)

    def fails():
        raise torch.OutOfMemoryError("on purpose")

    with pytest.raises(torch.OutOfMemoryError):
        device.run(device.copies(), fails)
    assert device.said[-1] == ("copies", "is waited for")
