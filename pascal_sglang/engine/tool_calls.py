"""Which replies call tools, as far as a scheduler can tell."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import get_serving

from pascal_sglang.engine.req_attributes import timeline_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.request_checks import asked_tool_wait_s, tools_of

logger = logging.getLogger(__name__)

# Tokens at the end of an answer that are read for a call. Longer calls are not noticed: the pass
# waits while they become text.
MOST_READ = 4096


class ToolCalls:
    """Reads replies with the format of `--tool-call-parser`, as the process does that serves HTTP.

    A scheduler has tokens alone; that tools were offered travels with the request
    (`entrypoints.request_notes`).
    """

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self._scheduler = scheduler
        self._detector = _detector_of(get_serving().tool_call_parser, scheduler.tokenizer)

    def wait_of(self, req: Req) -> tuple[bool, float | None]:
        """Whether the conversation of a request that has ended is expected to go on, and for how
        long its KV is to be kept, in seconds, where the request asks for that."""
        if req.finished_reason is None or req.finished_reason.to_json().get("type") != "stop":
            return False, None
        params = req.sampling_params
        seconds = asked_tool_wait_s(params.custom_params, req.kv_hints)
        if seconds is not None:
            return seconds > 0, seconds
        tools = tools_of(params.custom_params)
        return tools == "required" or (tools == "auto" and self._calls(req)), None

    def _calls(self, req: Req) -> bool:
        if self._detector is None:
            return False
        end = req.finished_len if req.finished_len is not None else len(req.output_ids)
        answer = min(end, timeline_of(req).answer_tokens, MOST_READ)
        try:
            text = self._scheduler.tokenizer.decode(
                list(req.output_ids[end - answer : end]), skip_special_tokens=False
            )
            return bool(self._detector.has_tool_call(text))
        except Exception:
            # Text of a model, and code of a format: whatever it trips over is no call.
            logger.debug("pascal_sglang: a reply could not be read for tool calls", exc_info=True)
            return False


def _detector_of(parser: str | None, tokenizer: Any) -> Any:
    """What finds calls in text; None where no parser is given, or tokens are not text here."""
    if parser is None or tokenizer is None:
        return None
    # Not at the top: SGLang's formats take a second to import.
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    try:
        return FunctionCallParser([], parser, tokenizer).detector
    except Exception:
        logger.warning(
            "pascal_sglang: replies are not read for tool calls: --tool-call-parser %s takes more "
            "than a tokenizer",
            parser,
        )
        return None
