"""The detokenizer's side of moves: the tokens of a moved request stay in order.

`cluster.output_order` has the rule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from pascal_sglang import clock
from pascal_sglang.cluster.instance_failures import MESSAGE
from pascal_sglang.cluster.output_order import OutputOrder, Row
from pascal_sglang.config import PascalConfig
from pascal_sglang.support import Level

logger = logging.getLogger(__name__)

LOOK_MS = 200


def event_loop(original: Callable[[Any], None], manager: Any) -> None:
    """Around `DetokenizerManager.event_loop`: the same, in order, where requests move."""
    from sglang.srt.managers.io_struct import BatchTokenIDOutput, sock_recv
    from sglang.srt.runtime_context import get_server_args

    config = PascalConfig.from_env()
    if config is None or config.support(get_server_args()).level < Level.MOVE:
        original(manager)
        return
    order: OutputOrder[Any] = OutputOrder()
    while True:
        with manager.soft_watchdog.disable():
            came = manager.recv_from_scheduler.poll(LOOK_MS if len(order) else None)
            received = sock_recv(manager.recv_from_scheduler) if came else None
        if isinstance(received, BatchTokenIDOutput) and received.dp_ranks:
            rows = rows_of(received)
            for message in order.admit(received.dp_ranks[0], received, rows, clock.now()):
                _handle(manager, message)
        elif received is not None:
            _handle(manager, received)
        for message, broken in order.overdue(clock.now()) if len(order) else ():
            end_rows(message, broken)
            _handle(manager, message)
        manager.soft_watchdog.feed()


def rows_of(output: Any) -> list[Row]:
    """Which tokens of which requests a `BatchTokenIDOutput` carries. Beam groups do not move, and
    their counts are those of all beams together."""
    beams = output.beam_search_output or [None] * len(output.rids)
    return [
        Row(rid, 0 if beam is not None else total - len(ids), total, reason is not None)
        for rid, ids, total, reason, beam in zip(
            output.rids,
            output.output_ids,
            output.completion_tokens,
            output.finished_reasons,
            beams,
            strict=True,
        )
    ]


def end_rows(output: Any, indices: list[int]) -> None:
    """Tokens before these rows are lost: their requests end with an error."""
    for index in indices:
        logger.error("pascal_sglang: tokens of %s were lost; it ends", output.rids[index])
        output.finished_reasons[index] = {
            "type": "abort",
            "message": f"{MESSAGE} Tokens are lost.",
            "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
            "err_type": "ServiceUnavailableError",
        }


def _handle(manager: Any, message: Any) -> None:
    from sglang.srt.managers.io_struct import sock_send

    output = manager._request_dispatcher(message)
    if output is not None:
        sock_send(manager.send_to_tokenizer, output)
