"""Held requests go back to the waiting queue without their KV, as SGLang's retracted ones do."""

from __future__ import annotations

from pascal_sglang.engine.request_states import RequestStates


def retract_held(states: RequestStates) -> None:
    """Drop the KV of every held request. No step is in flight.

    A request handed over to another instance waits only if that instance sends it back.
    """
    for req in states.paused_requests.drop():
        if not states.paused_requests.is_migrating(req):
            states.wait_again(req)
