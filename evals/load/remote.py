"""What a running server says about itself over HTTP, besides its answers."""

from __future__ import annotations

import http.client
import json
import shlex
import sys
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from evals.load import auth

INFO_KEYS = ("version", "model_path", "launch_command", "max_total_num_tokens", "device", "dtype")
# `/get_server_info` is the name before SGLang 0.5.
INFO_PATHS = ("/server_info", "/get_server_info")
POLL_S = 0.5
TIMEOUT_S = 10
STATUS_TIMEOUT_S = 30
COUNTERS = ("sglang:num_retract", "pascal:")
KEPT = ("tier", "why", "way", "outcome", "shortage", "reason")


def wait_ready(base_url: str, timeout_s: float) -> bool:
    """Whether `/health` answered within `timeout_s`; asks at least once, and says that it waits."""
    deadline, said = time.monotonic() + timeout_s, False
    while get(base_url, "/health") is None:
        if time.monotonic() >= deadline:
            return False
        if not said:
            print(
                f"no server answers at {base_url} yet; waiting up to {timeout_s:g} s",
                file=sys.stderr,
                flush=True,
            )
            said = True
        time.sleep(POLL_S)
    return True


def counters(base_url: str) -> dict[str, float]:
    """The server's counters of pauses, moves and retractions; empty without `/metrics`."""
    return parse_counters(get(base_url, "/metrics") or "")


def parse_counters(text: str) -> dict[str, float]:
    """Counters of interest in Prometheus text, one for each value of the labels `KEPT`, such as
    `pascal:paused_tokens_total{tier="recompute"}`, summed over all other labels."""
    found: dict[str, float] = {}
    # The rest of a page is thousands of lines.
    lines = (line for line in text.splitlines() if line.startswith(COUNTERS))
    for family in text_string_to_metric_families("\n".join(lines)):
        for sample in family.samples:
            if sample.name.endswith(("_total", "_sum", "_count")):
                labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items() if k in KEPT)
                key = f"{sample.name}{{{labels}}}" if labels else sample.name
                found[key] = found.get(key, 0.0) + sample.value
    return found


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How far each counter moved; one that is new counts from 0."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def server_info(base_url: str) -> dict[str, Any]:
    """What it runs and how it was started; empty where the server does not tell.

    A few named facts only: the rest of the reply may hold keys.
    """
    for path in INFO_PATHS:
        try:
            told = json.loads(get(base_url, path) or "null")
        except ValueError:
            continue
        if isinstance(told, dict):
            info = {key: told[key] for key in INFO_KEYS if told.get(key) is not None}
            if "launch_command" in info:
                info["launch_command"] = without_keys(info["launch_command"])
            return info
    return {}


def without_keys(command: str) -> str:
    """A command line with the value of every `--*key*` flag replaced."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    hidden, secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_key = name.startswith("--") and "key" in name
        hidden.append("***" if secret else f"{name}=***" if is_key and equals else word)
        secret = is_key and not equals
    return shlex.join(hidden)


def get(base_url: str, path: str) -> str | None:
    """The body, or None where there is none to have."""
    try:
        return _read(f"{base_url}{path}", TIMEOUT_S).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None


def instances(base_url: str) -> list[dict[str, Any]]:
    """What `GET /pascal/status` says of every instance."""
    told = json.loads(_read(f"{base_url}/pascal/status", STATUS_TIMEOUT_S))
    found: list[dict[str, Any]] = told["instances"]
    return found


def _read(url: str, timeout_s: float) -> bytes:
    request = urllib.request.Request(url, headers=auth.headers())
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        body: bytes = reply.read()
    return body
