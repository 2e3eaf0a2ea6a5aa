"""`GET /get_load`: the load of each instance as SGLang's model gateway reads it.

`sglang-router` 0.3.2 asks there, and takes the sum of `num_tokens` for the load of a server under
its policy `power_of_two`. SGLang has dropped the route for `/v1/loads`; without an answer every
server counts as equally idle there.
"""

from __future__ import annotations

from typing import Any

LOAD_PATH = "/get_load"


def add_route(app: Any) -> None:
    """Serve it where SGLang does not."""
    if LOAD_PATH not in {getattr(route, "path", None) for route in app.router.routes}:
        app.get(LOAD_PATH)(get_load)


async def get_load() -> list[dict[str, int]]:
    """Requests, running and waiting, and the tokens that they hold or wait with, by instance. A
    paused request waits; its KV counts wherever it is (`PascalLoadInquirer`)."""
    from sglang.srt.entrypoints import http_server

    loads = await http_server.get_global_state().tokenizer_manager.get_loads(include=["core"])
    return [
        {
            "dp_rank": load.dp_rank,
            "num_reqs": load.num_running_reqs + load.num_waiting_reqs,
            "num_waiting_reqs": load.num_waiting_reqs,
            "num_tokens": load.num_total_tokens,
        }
        for load in loads
    ]
