"""Every process that serves has to run our configuration, and says at which level it does: what
they tell each other at start."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from pascal_sglang.config import PascalConfig
from pascal_sglang.support import Support

INIT_INFO_KEY = "pascal"
PROCESS_KEY = "pascal_process"
HOST_KEY = "pascal_host"
STATUS_FILE_KEY = "pascal_board"
CONTROL_KEY = "pascal_control"
# Of an instance on another host: where it takes requests.
REQUESTS_KEY = "pascal_requests"
SUPPORT_KEY = "pascal_support"


def introduced(info: dict[str, Any], instance: int, support: Support) -> dict[str, Any]:
    """The init info of a scheduler: its configuration, its level, and who it is."""
    own = {INIT_INFO_KEY: own_config(), SUPPORT_KEY: support.describe()}
    here = {PROCESS_KEY: (os.getpid(), instance), HOST_KEY: socket.gethostname()}
    return {**info, **own, **here}


def support_of(infos: Iterable[dict[str, Any]]) -> Support:
    """The level of the instances that have shaken hands, together."""
    return Support.least(Support.described(info[SUPPORT_KEY]) for info in infos)


def instances_by_pid(infos: list[dict[str, Any]]) -> dict[int, int]:
    """The instance of each scheduler process, by its id."""
    return dict(info[PROCESS_KEY] for info in infos)


def hosts_by_instance(infos: list[dict[str, Any]]) -> dict[int, str]:
    """The name of the host of each instance's first process."""
    found: dict[int, str] = {}
    for info in infos:
        found.setdefault(info[PROCESS_KEY][1], str(info.get(HOST_KEY, "")))
    return found


def handed_on(
    info: dict[str, Any], status_file: str, control: str, support: Support
) -> dict[str, Any]:
    """The init info of a controller whose instances have all shaken hands, and have this level
    together; `status_file` is where it shows what it does, `control` the place of the control
    sockets."""
    own = {INIT_INFO_KEY: own_config(), SUPPORT_KEY: support.describe()}
    return {**info, **own, STATUS_FILE_KEY: status_file, CONTROL_KEY: control}


def change_of(values: Mapping[str, Any]) -> str:
    """A change of the configuration, as it travels in the id of a `GetInternalStateReq`: SGLang's
    own messages that set something take numbers alone."""
    return json.dumps(values)


def change_in(rid: str) -> dict[str, Any]:
    """What `change_of` said."""
    values: dict[str, Any] = json.loads(rid)
    return values


def own_config() -> str:
    """This process's configuration, as text to compare."""
    config = PascalConfig.from_env()
    assert config is not None
    return config.to_json()


def require_same_config(infos: list[dict[str, Any]]) -> None:
    """Raises: RuntimeError for a scheduler without our configuration.

    Catches the silent case of SGLang's fail-open loader: a process in which the plugin was skipped
    (for example by `SGLANG_PLUGINS`, or by another platform package's `SGLANG_PLATFORM`).
    """
    for rank, info in enumerate(infos):
        if info.get(INIT_INFO_KEY) != own_config():
            raise RuntimeError(
                f"pascal_sglang refuses to serve: scheduler {rank} runs without the plugin "
                f"(SGLANG_PLUGINS={os.environ.get('SGLANG_PLUGINS')}, "
                f"SGLANG_PLATFORM={os.environ.get('SGLANG_PLATFORM')})"
            )
