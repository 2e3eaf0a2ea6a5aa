"""The launching process's side: handshake with the schedulers, status route, request defaults."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from pascal_sglang.config import PascalConfig
from pascal_sglang.preflight import check_frontend

INIT_INFO_KEY = "pascal"
STATUS_PATH = "/pascal/status"


def require_handshake(original: Callable[..., list[dict[str, Any]]], *args: Any) -> Any:
    """Around `engine._wait_for_scheduler_ready`: every scheduler must run our configuration.

    Catches the silent case of SGLang's fail-open loader: a process in which the plugin was skipped
    (for example by `SGLANG_PLUGINS`, or by another platform package's `SGLANG_PLATFORM`).
    """
    infos = original(*args)
    require_same_config(infos)
    return infos


def handed_on(info: dict[str, Any]) -> dict[str, Any]:
    """The init info of a controller whose instances have all shaken hands."""
    return {**info, INIT_INFO_KEY: _own_config()}


def _own_config() -> str:
    config = PascalConfig.from_env()
    assert config is not None
    return config.to_json()


def require_same_config(infos: list[dict[str, Any]]) -> None:
    for rank, info in enumerate(infos):
        if info.get(INIT_INFO_KEY) != _own_config():
            raise RuntimeError(
                f"pascal_sglang refuses to serve: scheduler {rank} runs without the plugin "
                f"(SGLANG_PLUGINS={os.environ.get('SGLANG_PLUGINS')}, "
                f"SGLANG_PLATFORM={os.environ.get('SGLANG_PLATFORM')})"
            )


def keep_created_time(original: Callable[[Any], dict[str, Any]], stats: Any) -> dict[str, Any]:
    """Around `*ReqTimeStats.__getstate__`: let the arrival time travel to the scheduler.

    SGLang rebases every key that ends in "time" onto the receiver's clock.
    """
    return {**original(stats), "created_time": stats.created_time}


def add_status_route(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before `http_server._setup_and_run_http_server`: serve `GET /pascal/status`.

    Raises: `LaunchError` for what would silently not happen behind SGLang's own entry points.
    """
    from sglang.srt.entrypoints import http_server

    config = PascalConfig.from_env()
    assert config is not None
    check_frontend(config, server_args)

    async def status() -> dict[str, Any]:
        """Per instance: counts by phase, KV tokens, live and recent requests with their times."""
        states = await http_server.get_global_state().tokenizer_manager.get_internal_state()
        instances = sorted((s[INIT_INFO_KEY] for s in states), key=lambda i: i["dp_rank"])
        return {"instances": instances}

    if STATUS_PATH not in {getattr(route, "path", None) for route in http_server.app.routes}:
        http_server.app.get(STATUS_PATH)(status)


async def assume_reasoning(
    original: Callable[[Any, Any], Awaitable[Any]], obj: Any, request: Any
) -> Any:
    """Around `http_server.serve_generate_request`: the default of `--pascal-assume-reasoning`."""
    config = PascalConfig.from_env()
    if config is not None and config.assume_reasoning:
        body = await request.json()  # Parsed once and cached by Starlette.
        if "require_reasoning" not in body:
            obj.require_reasoning = True
    return await original(obj, request)
