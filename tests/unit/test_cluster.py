"""What the controller knows: prefixes it sent, status messages, its own decisions in between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.cluster.monitor import OPEN_DISPATCHES, Monitor
from pascal_sglang.cluster.prefixes import Prefixes
from pascal_sglang.cluster.status import BadStatus, Status, unpack


def status(**more):
    figures = {
        "dp_rank": 0,
        "received": 0,
        "on_pace": True,
        "footprint": 10,
        "thinking": 1,
        "fresh": 2,
        "free": 90,
        "waiting": 5,
        "capacity": 100,
        "running": 1,
        "pass_us": 5000,
        "prefill_ns": 800,
    }
    return Status(**{**figures, **more})


def test_a_prefix_is_found_by_whole_blocks_where_it_was_sent():
    prefixes = Prefixes(block_tokens=4)
    prefixes.sent(0, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    prefixes.sent(1, [1, 2, 3, 4, 9, 9, 9, 9])
    assert prefixes.hits([1, 2, 3, 4, 5, 6, 7, 8, 1]) == {0: 8, 1: 4}
    assert prefixes.hits([1, 2, 3]) == {}
    assert prefixes.hits([2, 2, 3, 4, 5, 6, 7, 8]) == {}, "a later block alone is no prefix"
    assert prefixes.hits([1, 2, 3, 4], salt="other") == {}


def test_the_memory_of_prefixes_is_bounded():
    prefixes = Prefixes(block_tokens=2, capacity=3)
    for start in range(10):
        prefixes.sent(0, [start, start])
    assert len(prefixes) == 3
    assert prefixes.hits([9, 9]) == {0: 2}
    assert prefixes.hits([0, 0]) == {}


def test_a_status_survives_the_wire():
    assert unpack(status(dp_rank=1).pack(), 2) == status(dp_rank=1)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "not JSON"),
        (b"[1]", "another version"),
        (b"{}", "another version"),
        (status().pack().replace(b'"version":2', b'"version":1'), "another version"),
        (status().pack().replace(b'"free":90', b'"fre":90'), "unknown or missing"),
        (status().pack().replace(b'"free":90', b'"free":-1'), "free is -1"),
        (status().pack().replace(b'"free":90', b'"free":9.5'), "free is 9.5"),
        (status().pack().replace(b'"on_pace":true', b'"on_pace":1'), "on_pace is 1"),
        (status(dp_rank=7).pack(), "no instance 7"),
        (b" " * 5000, "5000 bytes"),
    ],
)
def test_anything_else_is_rejected_and_counted(message, why):
    with pytest.raises(BadStatus, match=why):
        unpack(message, 2)
    monitor = Monitor(2)
    assert monitor.hear(message) is None
    assert sum(monitor.rejected.values()) == 1


@given(st.binary(max_size=200))
def test_no_bytes_take_the_controller_down(message):
    assert Monitor(1).hear(message) is None


def test_a_dispatch_counts_until_its_instance_has_taken_it_in():
    monitor = Monitor(2)
    monitor.sent(0, 20)
    monitor.sent(0, 30)
    monitor.hear(status(received=0).pack())
    assert (monitor.instances[0].thinking, monitor.instances[0].waiting) == (3, 55)
    monitor.hear(status(received=1).pack())
    assert (monitor.instances[0].thinking, monitor.instances[0].waiting) == (2, 35)
    monitor.hear(status(received=2).pack())
    assert (monitor.instances[0].thinking, monitor.instances[0].waiting) == (1, 5)
    assert monitor.instances[1].footprint == 0


def test_an_instance_that_never_reports_does_not_fill_the_memory():
    monitor = Monitor(1)
    for _ in range(OPEN_DISPATCHES + 10):
        monitor.sent(0, 1)
    monitor.hear(status(thinking=0, waiting=0).pack())
    assert monitor.instances[0].waiting == OPEN_DISPATCHES
