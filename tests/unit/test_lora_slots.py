"""SGLang's drainer, which lets one adapter make room for another, knows who waits."""

import time
from types import SimpleNamespace

import pytest
from sglang.srt.lora.lora_drainer import LoRADrainer

from pascal_sglang.engine.lora_slots import LoraSlots


def request(adapter, waited_s=0.0):
    return SimpleNamespace(
        lora_id=adapter,
        sampling_params=SimpleNamespace(max_new_tokens=100),
        output_ids=[],
        time_stats=SimpleNamespace(wait_queue_entry_time=time.monotonic() - waited_s),
    )


@pytest.mark.parametrize("paused", [True, False])
def test_an_adapter_makes_room_for_a_request_that_waits_or_is_paused(paused):
    """The plan holds back a request whose adapter does not fit: SGLang's prefill never sees it."""
    starves, fresh = request("c", waited_s=9.0), request("a")
    waiting, held = ([], [starves]) if paused else ([starves], [])
    scheduler = SimpleNamespace(
        enable_lora=True,
        lora_drainer=LoRADrainer(max_loras_per_batch=2, max_wait_time_secs=1.0),
        waiting_queue=waiting,
        chunked_req=None,
    )
    paused_requests = SimpleNamespace(paused=lambda: held, in_status=lambda *_: [])
    slots = LoraSlots(scheduler=scheduler, paused_requests=paused_requests)
    running = SimpleNamespace(reqs=[request("a"), request("b")])
    running.reqs[0].output_ids = [0] * 60
    slots.read(running, None)
    drained = scheduler.lora_drainer.adapter_to_stats
    assert {name: drained[name].is_draining_for for name in "ab"} == {"a": "c", "b": None}
    assert not scheduler.lora_drainer.can_schedule(fresh)
    running.reqs = running.reqs[1:]
    slots.read(running, None)
    assert drained["a"].is_draining_for is None
