"""The launching process's side: handshake with the schedulers, status route, request defaults."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from pascal_sglang.cluster import board
from pascal_sglang.config import PascalConfig
from pascal_sglang.handshake import BOARD_KEY, INIT_INFO_KEY, require_same_config
from pascal_sglang.preflight import check_frontend
from pascal_sglang.request_checks import problem_with_request

STATUS_PATH = "/pascal/status"
STATUS_S = 20.0
# What the status route repeats as `server_id`: a script knows the server that it started by it.
SERVER_ID_ENV = "PASCAL_SGLANG_SERVER_ID"
# Where the controller of this server shows what it does; empty without one.
_board: list[str] = []


def require_handshake(original: Callable[..., list[dict[str, Any]]], *args: Any) -> Any:
    """Around `engine._wait_for_scheduler_ready`: every scheduler must run our configuration."""
    infos = original(*args)
    shake_hands(infos)
    return infos


def shake_hands(infos: list[dict[str, Any]]) -> None:
    """Take note of what schedulers, or their controller, say of themselves at start.

    Raises: RuntimeError for one without our configuration.
    """
    require_same_config(infos)
    _board.extend(info[BOARD_KEY] for info in infos if BOARD_KEY in info)


def keep_created_time(original: Callable[[Any], dict[str, Any]], stats: Any) -> dict[str, Any]:
    """Around `*ReqTimeStats.__getstate__`: let the arrival time travel to the scheduler.

    SGLang rebases every key that ends in "time" onto the receiver's clock.
    """
    return {**original(stats), "created_time": stats.created_time}


def add_status_route(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before `http_server._setup_and_run_http_server`: serve `GET /pascal/status`.

    Raises: `LaunchError` for what would silently not happen behind SGLang's own entry points.
    """
    from fastapi import HTTPException
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import AuthLevel, auth_level

    config = PascalConfig.from_env()
    assert config is not None
    check_frontend(config, server_args)

    # Ids of everybody's requests: for the operator, as SGLang's route that aborts by id.
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def status() -> dict[str, Any]:
        """Per instance: counts by phase, KV tokens, live and recent requests with their times."""
        manager = http_server.get_global_state().tokenizer_manager
        whole = type(manager).get_internal_state.__wrapped__  # Around it is `withhold_status`.
        try:
            states = await asyncio.wait_for(whole(manager), STATUS_S)
        except TimeoutError:
            raise HTTPException(HTTPStatus.GATEWAY_TIMEOUT, "an instance does not answer") from None
        instances = sorted((s[INIT_INFO_KEY] for s in states), key=lambda i: i["dp_rank"])
        shown = {"controller": board.read(_board[-1])} if _board else {}
        if server_id := os.environ.get(SERVER_ID_ENV):
            shown["server_id"] = server_id
        return {"instances": instances, **shown}

    if STATUS_PATH not in {getattr(route, "path", None) for route in http_server.app.routes}:
        http_server.app.get(STATUS_PATH)(status)


async def withhold_status(
    original: Callable[[Any], Awaitable[list[dict[str, Any]]]], manager: Any
) -> list[dict[str, Any]]:
    """Around `TokenizerControlMixin.get_internal_state`, which `/server_info` shows to everybody
    with the API key: what is for `STATUS_PATH` stays there."""
    states = await original(manager)
    return [{k: v for k, v in state.items() if k != INIT_INFO_KEY} for state in states]


async def assume_reasoning(
    original: Callable[[Any, Any], Awaitable[Any]], obj: Any, request: Any
) -> Any:
    """Around `http_server.serve_generate_request`: the default of `--pascal-assume-reasoning`.

    A stream too is refused with a 400 here; later, SGLang puts the error into the stream.
    """
    from sglang.srt.entrypoints.http_server import _create_error_response

    config = PascalConfig.from_env()
    override = request.headers.get("x-override-rid")
    if config is not None and (problem := problem_with_request(config, obj, override)):
        return _create_error_response(ValueError(problem))
    if config is not None and config.assume_reasoning:
        body = await request.json()  # Parsed once and cached by Starlette.
        if "require_reasoning" not in body:
            obj.require_reasoning = True
    return await original(obj, request)
