"""The launching process's side: handshake with the schedulers, status route, request defaults."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import Any

from pascal_sglang.cluster import status_file
from pascal_sglang.cluster.control_channel import CONTROL_ENV
from pascal_sglang.cluster.control_keys import hand_out_secret
from pascal_sglang.cluster.forecast_files import FOLDER_ENV
from pascal_sglang.cluster.metric_files import survive_a_full_disk
from pascal_sglang.cluster.metrics import FrontendMetrics
from pascal_sglang.cluster.private_folder import PrivateFolder, remove_all, reserve
from pascal_sglang.config import CONFIG_ENV, ConfigError, LaunchError, PascalConfig
from pascal_sglang.entrypoints import answer_eta
from pascal_sglang.entrypoints.crash import CrashShutdown, ProcessWatch, end_children
from pascal_sglang.entrypoints.eta_response import AnswerEtaMiddleware
from pascal_sglang.entrypoints.json_body import object_in
from pascal_sglang.entrypoints.live_page import PAGE_PATH, headers, page
from pascal_sglang.entrypoints.metric_names import MetricNames
from pascal_sglang.entrypoints.preflight import check_frontend
from pascal_sglang.entrypoints.server_drain import ServerDrain, ServerDrainMiddleware
from pascal_sglang.entrypoints.server_facts import ServerFacts, at_most, rounded
from pascal_sglang.handshake import (
    CONTROL_KEY,
    INIT_INFO_KEY,
    STATUS_FILE_KEY,
    change_of,
    require_same_config,
    support_of,
)
from pascal_sglang.support import Support

STATUS_PATH = "/pascal/status"
CONFIG_PATH = "/pascal/config"
HEALTH_PATH = "/health"
# For every instance to say how it is, in seconds, and how often to ask. From the second time on the
# controller answers for one that has just fallen silent.
STATUS_S = 7.0
STATUS_ASKED = 3
# A controller shows itself twice a second; it hangs when it has not for this many seconds.
SHOWN_S = 5.0
# What the status route repeats as `server_id`: a script knows the server that it started by it.
SERVER_ID_ENV = "PASCAL_SGLANG_SERVER_ID"
# Changes of the configuration, one after the other.
_changes = asyncio.Lock()
# Where the controller of this server shows what it does; empty without one.
_status_files: list[str] = []
# The place of its control sockets; empty without one.
_control_places: list[str] = []


def require_handshake(original: Callable[..., list[dict[str, Any]]], *args: Any) -> Any:
    """Around `engine._wait_for_scheduler_ready`: every scheduler must run our configuration."""
    infos = original(*args)
    shake_hands(infos)
    return infos


def shake_hands(infos: list[dict[str, Any]]) -> None:
    """Take note of what schedulers, or their controller, say of themselves at start, and say at
    which level they serve.

    Raises: RuntimeError for one without our configuration, or for less than `--pascal-require`.
    """
    require_same_config(infos)
    config = PascalConfig.from_env()
    assert config is not None
    support = support_of(infos)
    print(f"pascal_sglang: level {support}", file=sys.stderr, flush=True)
    try:
        config.require_level(support)
    except LaunchError as error:
        raise RuntimeError(f"pascal_sglang refuses to serve: {error}") from None
    _status_files.extend(info[STATUS_FILE_KEY] for info in infos if STATUS_FILE_KEY in info)
    _control_places.extend(info[CONTROL_KEY] for info in infos if CONTROL_KEY in info)


def keep_created_time(original: Callable[[Any], dict[str, Any]], stats: Any) -> dict[str, Any]:
    """Around `*ReqTimeStats.__getstate__`: let the arrival time travel to the scheduler.

    SGLang rebases every key that ends in "time" onto the receiver's clock.
    """
    return {**original(stats), "created_time": stats.created_time}


def name_control_folder(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `Engine._launch_scheduler_processes`, which starts processes that have to know folders
    of ours: the one for forecasts, and with DP attention, where no controller starts the
    schedulers, the controller's; and the secret of control sockets that are open over TCP."""
    from pascal_sglang.instances import instance_count, step_together

    hand_out_ways()
    if step_together() and instance_count() > 1:
        os.environ[CONTROL_ENV] = reserve()
    return original(*args, **kwargs)


def hand_out_ways() -> None:
    """What schedulers that are about to start find in this process's environment: the folder for
    forecasts, and the secret of control sockets over TCP."""
    os.environ.pop(CONTROL_ENV, None)
    os.environ.pop(FOLDER_ENV, None)
    config = PascalConfig.from_env()
    assert config is not None
    hand_out_secret(config)
    if config.record.schedules:
        with contextlib.suppress(OSError):  # Then there are no forecasts.
            os.environ[FOLDER_ENV] = PrivateFolder().path


def run_http_server(
    original: Callable[..., None],
    server_args: Any,
    manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: Any,
    watchdog: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Around `http_server._setup_and_run_http_server`: our routes, an orderly end after a death.

    Raises: `LaunchError` for what would silently not happen behind SGLang's own entry points;
    SystemExit with one line when a process of the server has died.
    """
    config = PascalConfig.from_env()
    assert config is not None
    check_frontend(config, server_args)
    if server_args.enable_metrics:
        survive_a_full_disk()

    def clean_up() -> None:
        remove_all()
        _remove_load_file(port_args)

    crash = CrashShutdown(manager, clean_up)
    crash.handle_signals()
    watch = ProcessWatch(
        [] if watchdog is None else watchdog._processes,
        [] if watchdog is None else watchdog._names,
        crash.begin,
    )
    if watchdog is not None:
        watchdog.stop()
    model = str(server_args.served_model_name)
    metrics = FrontendMetrics(model) if server_args.enable_metrics else None
    # The router of several tokenizers has no such state, and serves no HTTP itself. `fcfs` ends as
    # stock SGLang does.
    drain = ServerDrain(
        lambda: config.record.schedules and bool(getattr(manager, "gracefully_exit", False))
    )
    if metrics is not None:
        drain.on_refused = lambda: metrics.count("refused", "drained")
    add_routes(crash, ServerFacts(manager), drain)
    answer_eta.activate(config, states_and_drains, metrics)
    watch.start()
    try:
        original(
            server_args,
            manager,
            template_manager,
            port_args,
            scheduler_infos,
            watch,
            *args,
            **kwargs,
        )
    finally:
        watch.stop()
        end_children()
        clean_up()
    if crash.reason is not None:
        raise SystemExit(f"pascal_sglang: error: {crash.reason}")


def _remove_load_file(port_args: Any) -> None:
    """SGLang's schedulers leave their shared file of loads behind when they are killed."""
    from sglang.srt.managers.load_snapshot import shm_path_for

    with contextlib.suppress(OSError):
        os.unlink(shm_path_for(port_args.instance_id))


def add_routes(crash: CrashShutdown, facts: ServerFacts, drain: ServerDrain) -> None:
    """Serve our own routes, and `instances=1` of `GET /health`."""
    from fastapi import HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import AuthLevel, auth_level
    from starlette.routing import Route

    from pascal_sglang.entrypoints import drain_routes, load_route
    from pascal_sglang.instances import instance_count

    # Ids of everybody's requests: for the operator, as SGLang's route that aborts by id.
    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def status(requests: str | None = None) -> dict[str, Any]:
        """The server, and per instance: counts by phase, KV tokens, live and recent requests with
        their times. requests: list no more of each than that."""
        if requests is not None and not re.fullmatch("[0-9]{1,9}", requests):
            raise HTTPException(HTTPStatus.BAD_REQUEST, "requests must be a whole number")
        said = await ask_instances()
        if said is None:
            raise HTTPException(HTTPStatus.GATEWAY_TIMEOUT, "an instance does not answer")
        shown: dict[str, Any] = {"controller": controller()} if _status_files else {}
        if server_id := os.environ.get(SERVER_ID_ENV):
            shown["server_id"] = server_id
        if drain.is_on():
            shown["drain"] = drain.describe()
        # The controller's answer for an instance that is dead or silent has no level.
        levels = [Support.described(i["support"]) for i in said if "support" in i]
        if levels:
            shown["support"] = Support.least(levels).describe()
        if (admission := answer_eta.describe()) is not None:
            shown["admission"] = admission
        if requests is not None:
            said = [at_most(instance, int(requests)) for instance in said]
        whole: dict[str, Any] = rounded({**facts.describe(), "instances": said, **shown})
        return whole

    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def configuration(request: Request) -> Any:
        """`GET`: the configuration, and what of it may change. `PUT`: change that."""
        if request.method == "PUT":
            try:
                await change_configuration(await request.body())
            except ConfigError as error:
                raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
            except TimeoutError as error:
                raise HTTPException(HTTPStatus.GATEWAY_TIMEOUT, str(error)) from None
        config = PascalConfig.from_env()
        assert config is not None
        whole = dataclasses.asdict(config)
        return JSONResponse({"config": whole, "changeable": list(config.changeable())})

    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def live_page() -> Any:
        """A page that shows the status, again every second."""
        return HTMLResponse(page(), headers=headers())

    async def health(request: Request) -> Any:
        """SGLang's; with `instances=1` also the state of each: 503 unless all are live."""
        if crash.reason is not None:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, f"The server ends: {crash.reason}.")
        answer = await http_server.health_generate(request)
        if request.query_params.get("instances") in (None, "", "0"):
            return answer
        states = instance_states()
        healthy = answer.status_code == HTTPStatus.OK and set(states) == {"live"}
        return JSONResponse(
            {"instances": states, "live": states.count("live")},
            HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE,
        )

    routes = http_server.app.router.routes
    if STATUS_PATH not in {getattr(route, "path", None) for route in routes}:
        http_server.app.get(STATUS_PATH)(status)
        own = Route(CONFIG_PATH, configuration, methods=["GET", "PUT"], include_in_schema=False)
        routes.append(own)
        http_server.app.get(PAGE_PATH, response_class=HTMLResponse)(live_page)
        http_server.app.add_middleware(MetricNames)
        drain_routes.add_routes(http_server.app, _control_places, instance_count(), drain)
        load_route.add_route(http_server.app)
        # Before SGLang's: the first that matches is taken. FastAPI's own kind of route would take
        # `request` for a query parameter: it does not find the name of its type from here.
        routes.insert(0, Route(HEALTH_PATH, health, methods=["GET"], include_in_schema=False))
        http_server.app.add_middleware(AnswerEtaMiddleware)
        http_server.app.add_middleware(ServerDrainMiddleware, drain=drain, routes=routes)


async def ask_instances(change: str | None = None) -> list[dict[str, Any]] | None:
    """What every instance says of itself, in their order; None if one does not answer. change: of
    the configuration (`handshake.change_of`), made before; asking again does no harm."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = http_server.get_global_state().tokenizer_manager
    manager.auto_create_handle_loop()

    async def ask() -> list[dict[str, Any]]:
        answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=change))
        return [answer.internal_state for answer in answers]

    if (states := await _in_time(ask)) is None:
        return None
    instances = (state[INIT_INFO_KEY] for state in states)
    return sorted(instances, key=lambda instance: int(instance["dp_rank"]))


async def _in_time(
    ask: Callable[[], Awaitable[list[dict[str, Any]]]],
) -> list[dict[str, Any]] | None:
    """The internal state of every instance; None if one does not answer.

    What does not end in time is cancelled: SGLang's communicator takes one request at a time.
    """
    for _ in range(STATUS_ASKED):
        try:
            states = await asyncio.wait_for(ask(), STATUS_S)
        except TimeoutError:
            continue
        # One that was silent may answer late, to what was asked before, and so twice.
        if len({state[INIT_INFO_KEY]["dp_rank"] for state in states}) == len(states):
            return states
    return None


async def change_configuration(body: bytes) -> None:
    """Let every process go by other values of the configuration from its next pass on.

    body: a JSON object with fields that may change. Raises: ConfigError, where nothing has changed;
    TimeoutError for an instance that does not answer, which says whether anything has.
    """
    try:
        values = object_in(body)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    from sglang.srt.entrypoints import http_server

    async with _changes:
        before = PascalConfig.from_env()
        assert before is not None
        config = before.changed(values)
        manager = http_server.get_global_state().tokenizer_manager
        try:
            check_frontend(config, manager.server_args)
        except LaunchError as error:
            raise ConfigError(str(error)) from None
        if not values:
            return
        change, sent = change_of(values), asyncio.Event()

        def follow() -> None:
            os.environ[CONFIG_ENV] = config.to_json()
            answer_eta.reconfigure(config)
            sent.set()

        with _when_sent(manager.get_internal_state_communicator, change, follow):
            answered = await ask_instances(change) is not None
        if not answered:
            outcome = "it changes when it goes on" if sent.is_set() else "nothing has changed"
            raise TimeoutError(f"an instance does not answer; {outcome}")


@contextlib.contextmanager
def _when_sent(communicator: Any, change: str, follow: Callable[[], None]) -> Iterator[None]:
    """Call `follow` as the change leaves: the communicator sends no request while it waits for the
    replies to another one, and this process must not go by a change that no instance gets."""
    send = communicator._send

    def send_and_follow(request: Any) -> None:
        send(request)
        if request.rid == change:
            follow()

    communicator._send = send_and_follow
    try:
        yield
    finally:
        communicator._send = send


def controller() -> dict[str, Any]:
    """What the controller last showed; without its folder, what keeps us from knowing."""
    try:
        return status_file.read(_status_files[-1])
    except (OSError, ValueError) as error:
        return {"unreadable": str(error)}


def instance_states() -> list[str]:
    """`live`, `silent` or `dead` by instance. One without a controller is live, or else the server
    ends; nothing is known of any whose controller has stopped to show them."""
    if not _status_files:
        return ["live"]
    shown = controller()
    states: list[str] = shown.get("states", [])
    return states if shown.get("shown_s_ago", SHOWN_S) < SHOWN_S else ["unknown"] * len(states)


def states_and_drains() -> list[str]:
    """The same, and `drained` for a live one that takes no new requests."""
    drains = controller().get("drains", {}) if _status_files else {}
    return [
        "drained" if state == "live" and str(instance) in drains else state
        for instance, state in enumerate(instance_states())
    ]


async def withhold_status(
    original: Callable[[Any], Awaitable[list[dict[str, Any]]]], manager: Any
) -> list[dict[str, Any]]:
    """Around `TokenizerControlMixin.get_internal_state`, which `/server_info` shows to everybody
    with the API key: what is for `STATUS_PATH` stays there.

    Raises: HTTPException (504) for an instance that does not answer.
    """
    states = await _in_time(lambda: original(manager))
    if states is None:
        from fastapi import HTTPException

        raise HTTPException(HTTPStatus.GATEWAY_TIMEOUT, "an instance does not answer")
    return [{k: v for k, v in state.items() if k != INIT_INFO_KEY} for state in states]


async def living_layouts(
    original: Callable[[Any], Awaitable[list[dict[str, Any]]]], manager: Any
) -> list[dict[str, Any]]:
    """Around `TokenizerControlMixin.get_hicache_l3_cache_layout`: without the empty ones of dead
    instances. SGLang's route calls layouts that differ inconsistent."""
    return [layout for layout in await original(manager) if layout]


async def assume_reasoning(
    original: Callable[[Any, Any], Awaitable[Any]], obj: Any, request: Any
) -> Any:
    """Around `http_server.serve_generate_request`: the default of `--pascal-assume-reasoning`.

    A stream too is refused with a 400 here; later, SGLang puts the error into the stream.
    """
    from sglang.srt.entrypoints.http_server import _create_error_response

    config = PascalConfig.from_env()
    override = request.headers.get("x-override-rid")
    if config is not None and (problem := config.problem_with_request(obj, override)):
        return _create_error_response(ValueError(problem))
    if config is not None and config.assume_reasoning:
        body = await request.json()  # Parsed once and cached by Starlette.
        if "require_reasoning" not in body:
            obj.require_reasoning = True
    if config is None or config.fairness == "off":  # Otherwise once its tenant is known.
        try:
            answer_eta.decide(obj)  # Before the response to a stream begins.
        except answer_eta.Overloaded as error:
            return _create_error_response(error)
    return await original(obj, request)
