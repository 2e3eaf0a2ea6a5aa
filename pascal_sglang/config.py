"""One frozen configuration, handed to every process as JSON in `PASCAL_SGLANG_CONFIG`."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pascal_sglang import request_checks, request_ids
from pascal_sglang.policy.registry import Policy, UnknownPolicy, find
from pascal_sglang.policy.request import Reader
from pascal_sglang.request_checks import ASKED_TPOT_MS, asked, is_number, reader_of

CONFIG_ENV = "PASCAL_SGLANG_CONFIG"
# Set in Ray's actors, which are child processes that `multiprocessing` does not know as such.
ACTOR_ENV = "PASCAL_SGLANG_ACTOR"

DEMOTE_ON = ("kv", "thinking")
PLACEMENTS = ("phase", "sglang")
MIGRATIONS = ("adaptive", "always", "off")
KV_TRANSPORTS = ("auto", "shm", "mooncake")


class ConfigError(ValueError):
    """A configuration value that cannot be served; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PascalConfig:
    """What `--pascal-*` decided.

    policy: name of the scheduling policy (`policy.registry.find`).
    quantum_tokens, demote_tokens: see `policy.ranking.Tuning`.
    demote_on: what counts towards `demote_tokens`: `kv`, all KV beyond the prompt, or `thinking`,
        thinking tokens alone (a model may write text before it opens its thinking).
    answer_tpot_ms: the reader's pace, milliseconds per answering token; a request may override it
        in `custom_params["pascal"]["answer_tpot_ms"]`.
    qoe_slo: an answer whose QoE ends below this counts as an SLO violation.
    host_kv_gb: host memory for paused KV, per instance; None: twice the device pool, at most this
        instance's share of a quarter of the memory that is free at start.
    pace_stream: streamed answers leave the server at the reader's pace.
    placement: `phase`, or `sglang` for the balancing of `--load-balance-method`; only with several
        instances. The launcher sets the latter where that flag is given.
    migration: whether a request may move to another instance at the end of its thinking:
        `adaptive`, where that helps; `always`, by counts alone (PASCAL without its adaptive
        override); or `off`. Only with several instances that are placed by phase.
    live_migration: KV is copied while the request still decodes; otherwise it stops first.
    kv_transport: how KV gets from one instance to another; `auto` is `shm` inside a host.
    kv_listen: an IPv4 address of this host at which peers on a network reach the `mooncake`
        transport; None: 127.0.0.1, this host alone.
    gpus: how many GPUs the instances share, one beside the other; None: each has its own. To try
        several instances on one GPU; `mem_fraction_static` has to leave room.
    assume_reasoning: `/generate` requests that do not say `require_reasoning` count as reasoning.
    log_decisions: log every scheduling decision as one line of JSON.
    default_thinking_budget: thinking tokens after which a request without a logit processor of its
        own is made to close its thinking; None leaves requests alone. Set by `--demo`.
    client_processors: whether clients may send logit processors, which are code, where SGLang's
        flag is given. `--demo`, which gives it for its own ones, says no.
    chaos: for tests: the chance per pass that a running request is paused, or a paused one resumed,
        whatever the policy says.
    force_migration: for tests: every request moves at the end of its thinking, and with this chance
        per pass again.
    """

    policy: str = "pascal"
    quantum_tokens: int = 500
    demote_tokens: int = 5000
    demote_on: str = "kv"
    answer_tpot_ms: float = 100.0
    qoe_slo: float = 0.95
    host_kv_gb: float | None = None
    pace_stream: bool = False
    placement: str = "phase"
    migration: str = "adaptive"
    live_migration: bool = True
    kv_transport: str = "auto"
    kv_listen: str | None = None
    gpus: int | None = None
    assume_reasoning: bool = False
    log_decisions: bool = False
    default_thinking_budget: int | None = None
    client_processors: bool = True
    chaos: float = 0.0
    force_migration: float = 0.0

    def __post_init__(self) -> None:
        try:
            find(self.policy)
        except UnknownPolicy as error:
            raise ConfigError(str(error)) from error
        for name, choices in (
            ("demote_on", DEMOTE_ON),
            ("placement", PLACEMENTS),
            ("migration", MIGRATIONS),
            ("kv_transport", KV_TRANSPORTS),
        ):
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for name in (
            "pace_stream",
            "live_migration",
            "assume_reasoning",
            "log_decisions",
            "client_processors",
        ):
            _require(isinstance(getattr(self, name), bool), f"{name} must be true or false")
        if self.kv_listen is not None:
            self._require_one_address()
        self._require_whole("quantum_tokens", at_least=1)
        self._require_whole("demote_tokens", at_least=1)
        self._require_whole("default_thinking_budget", at_least=0, optional=True)
        self._require_whole("gpus", at_least=1, optional=True)
        self._require_number("answer_tpot_ms", above=0)
        self._require_number("qoe_slo", above=0)
        _require(self.qoe_slo <= 1, f"qoe_slo is at most 1, not {self.qoe_slo!r}")
        self._require_number("host_kv_gb", above=-1e-9, optional=True)
        self._require_number("chaos", above=-1e-9)
        self._require_number("force_migration", above=-1e-9)
        _require(
            max(self.chaos, self.force_migration) <= 1,
            "chaos and force_migration are probabilities",
        )

    def _require_one_address(self) -> None:
        try:
            address = ipaddress.IPv4Address(str(self.kv_listen))
        except ValueError:
            address = ipaddress.IPv4Address(0)
        one = not (address.is_unspecified or address.is_multicast or address.is_reserved)
        _require(one, f"kv_listen must be one IPv4 address, not {self.kv_listen!r}")
        _require(
            self.kv_transport == "mooncake",
            f"kv_listen is for the mooncake transport; {self.kv_transport} listens nowhere",
        )

    def _require_whole(self, name: str, at_least: int, optional: bool = False) -> None:
        value = getattr(self, name)
        holds = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
        _require(
            holds or (optional and value is None),
            f"{name} must be a whole number of at least {at_least}, not {value!r}",
        )

    def _require_number(self, name: str, above: float, optional: bool = False) -> None:
        value = getattr(self, name)
        holds = isinstance(value, int | float) and not isinstance(value, bool)
        holds = holds and math.isfinite(value) and value > above
        _require(
            holds or (optional and value is None),
            f"{name} must be a number above {above:g}, not {value!r}",
        )

    @classmethod
    def from_json(cls, text: str) -> PascalConfig:
        """Parse the value of `PASCAL_SGLANG_CONFIG`; unknown keys are errors, not surprises."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{CONFIG_ENV} is not JSON: {error}") from error
        _require(isinstance(values, dict), f"{CONFIG_ENV} must hold a JSON object")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        _require(not unknown, f"{CONFIG_ENV} has unknown keys: {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> PascalConfig | None:
        """The configuration of this process, or None where nobody asked for pascal_sglang."""
        text = environ.get(CONFIG_ENV)
        return cls.from_json(text) if text else None

    def answer_tpot_ms_of(self, custom_params: object) -> float:
        """The pace of one request's reader: its own, in `custom_params`, or everybody's. What HTTP
        should have refused (`request_checks`) becomes the nearest that may be asked for."""
        pace = asked(custom_params, "answer_tpot_ms")
        if not is_number(pace):
            return self.answer_tpot_ms
        low, high = ASKED_TPOT_MS
        # Clamped as whole numbers are, which may be larger than any float.
        return float(min(max(pace, low), high))

    def stream_tpot_ms_of(self, sampling: dict[str, Any]) -> float:
        """The pace at which a streamed answer leaves; 0, at once, where a program reads it."""
        if reader_of(True, sampling) is Reader.PROGRAM:
            return 0.0
        return self.answer_tpot_ms_of(sampling.get("custom_params"))

    def reader_of(self, streamed: bool, sampling: object) -> Reader:
        """Who reads the answer of a request with these sampling parameters."""
        return reader_of(streamed, sampling)

    def problem_with_request(self, obj: Any, override: str | None = None) -> str | None:
        """What this server refuses in a request, or in a batch, that SGLang itself would take; None
        if nothing is wrong. override: the id that a header gives it."""
        if self.record.schedules:
            for rid in (getattr(obj, "rid", None), override):
                if (problem := request_ids.problem_with(rid)) is not None:
                    return problem
        params = getattr(obj, "sampling_params", None)
        return request_checks.problem_with(params) if self.paces else None

    @property
    def record(self) -> Policy:
        """All that is known of the policy."""
        return find(self.policy)

    @property
    def paces(self) -> bool:
        """Whether anything here goes by the pace of a request's reader."""
        return self.record.schedules or self.pace_stream

    @property
    def places(self) -> bool:
        """Whether new requests are placed by phase."""
        return self.placement == "phase" and self.record.placement is not None

    @property
    def can_migrate(self) -> bool:
        """Whether requests may move between instances."""
        return self.places and self.migration != "off"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def banner(self) -> str:
        """The one start line: policy first, then every value."""
        values = dataclasses.asdict(self)
        values.pop("policy")
        shown = " ".join(f"{name}={value}" for name, value in values.items())
        return f"pascal_sglang: policy={self.policy} {shown}"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
