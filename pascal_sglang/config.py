"""One frozen configuration: the `--pascal-*` flags, handed to every process as JSON in
`PASCAL_SGLANG_CONFIG`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import ipaddress
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from pascal_sglang import request_checks, request_ids
from pascal_sglang.policy.registry import POLICIES, Policy, UnknownPolicy, find
from pascal_sglang.policy.request import Reader
from pascal_sglang.request_checks import ASKED_TPOT_MS, asked, is_number, reader_of
from pascal_sglang.support import LEVELS, Level, Support, of_server

CONFIG_ENV = "PASCAL_SGLANG_CONFIG"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# Before the name of the header that a tenant is known by.
FAIRNESS_HEADER = "header:"
# In the help of a flag whose field can change while the server runs.
CHANGEABLE = " [may change while serving]"
# The most that a number of tokens may be: a request is never that long.
MOST_TOKENS = 10**9
# Set in Ray's actors, which are child processes that `multiprocessing` does not know as such.
ACTOR_ENV = "PASCAL_SGLANG_ACTOR"


class ConfigError(ValueError):
    """A configuration value that cannot be served; the message is one line."""


class LaunchError(Exception):
    """The server cannot start for a reason the user can act on; the message is one line."""


def _field(
    default: Any,
    text: str | None = None,
    *,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    changeable: bool = False,
) -> Any:
    """A field with the values that it takes. With a text it is a `--pascal-*` flag too, of which
    `--help` and docs/serving.md are made. changeable: `PUT /pascal/config` takes it too."""
    limits = {"choices": choices, "least": least, "above": above, "most": most}
    told = {"text": text, "metavar": metavar, "changeable": changeable}
    return field(default=default, metadata=told | limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class PascalConfig:
    """What `--pascal-*` decided: one declaration a field makes the flag, its check and its docs."""

    # A name that `policy.registry.find` knows.
    policy: str = _field(
        "pascal",
        "pascal: thinking first, answers on pace; paper: PASCAL to the letter; rr: phase-blind "
        "round robin, rr-restart: its count restarts at the phase boundary; fcfs: SGLang's own "
        "order untouched; or a record of your own",
        metavar="{" + ",".join(POLICIES) + "} or MODULE:NAME",
    )
    # This and the next: see `policy.ranking.Tuning`.
    quantum_tokens: int = _field(
        500,
        "tokens a request runs before others of its class get their turn",
        least=1,
        most=MOST_TOKENS,
        changeable=True,
    )
    demote_tokens: int = _field(
        5000,
        "a thinker longer than this falls behind shorter ones",
        least=1,
        most=MOST_TOKENS,
        changeable=True,
    )
    # A model may write text before it opens its thinking.
    demote_on: str = _field(
        "kv",
        "what counts towards that: all KV beyond the prompt, or thinking tokens",
        choices=("kv", "thinking"),
        changeable=True,
    )
    # Multiplies `policy.ranking.Tuning.settle`.
    answer_bias: float = _field(
        1.0,
        "how far ahead of its reader an answer has to be before thinking displaces it, as a "
        "multiple of the default: less begins answers sooner, more ends them sooner",
        above=0,
        most=1e6,
        changeable=True,
    )
    # A request may override it in `custom_params["pascal"]["answer_tpot_ms"]`.
    answer_tpot_ms: float = _field(
        100.0,
        "the reader's pace: milliseconds per answering token",
        above=0,
        most=1e6,
        changeable=True,
    )
    qoe_slo: float = _field(
        0.95,
        "answers whose QoE ends below this count as SLO violations",
        above=0,
        most=1,
        changeable=True,
    )
    # None: twice the device pool, at most this instance's share of a quarter of the memory that is
    # free at start.
    host_kv_gb: float | None = _field(
        None,
        "host memory for paused KV, per instance (default: by the device pool's size)",
        least=0,
    )
    tool_kv: float = _field(
        0.0,
        "share of that memory for KV of conversations whose last reply called tools: under memory "
        "pressure it waits there for the next turn, for as long as tools take here; 0: none does",
        least=0,
        most=0.9,
    )
    # Only with several instances that are placed by phase. None: `adaptive` or `off`, as the
    # policy's record says. `always` is PASCAL without its adaptive override. Whatever it is but
    # `off`, an instance that is drained is emptied by moves.
    migration: str | None = _field(
        None,
        "with --dp-size above 1: whether a request may move to another instance at the end of its "
        "thinking; adaptive: where that helps, always: by counts alone; drain: only off an "
        "instance that is drained, at any time (default: adaptive for paper, off for the others)",
        choices=("adaptive", "always", "drain", "off"),
    )
    drain_on_term: bool = _field(
        False,
        "with --dp-size above 1: an instance whose process gets SIGTERM is drained before it ends, "
        "as long as another one takes requests; a second SIGTERM ends it at once",
    )
    live_migration: bool = _field(
        True, "copy KV while the request still decodes; otherwise it stops first"
    )
    kv_transport: str = _field(
        "auto",
        "how KV moves; auto: shm, inside a host; mooncake: Mooncake Transfer Engine",
        choices=("auto", "shm", "mooncake"),
    )
    kv_listen: str | None = _field(
        None,
        "where mooncake listens: an IPv4 address, or a network like 10.0.0.0/24 or an interface, "
        "of which each host takes its own; every user of a host with instances can read and write "
        "KV that moves (default: 127.0.0.1)",
        metavar="ADDRESS",
    )
    # This and the next: `cluster.control_keys`.
    control_listen: str | None = _field(
        None,
        "with --dp-size above 1: open the control sockets over TCP, encrypted, to this server's "
        "processes alone, so that instances may be on other hosts; the controller listens at this "
        "address of its host (default: sockets in a private folder of this host)",
        metavar="ADDRESS",
    )
    control_secret: str | None = _field(
        None,
        "with --pascal-control-listen: a file with the secret that keys are made of, the same on "
        "all hosts; its mode must be 0600 (default: a secret of this start, which the launcher "
        "hands out)",
        metavar="FILE",
    )
    racks: str | None = _field(
        None,
        "with --use-ray over several hosts: the rack of each host, by the network of the address "
        "that Ray knows it by, such as a=10.0.1.0/24,b=10.0.2.0/24; requests move to near "
        "instances first (default: all other hosts are equally near)",
        metavar="RACK=NETWORK,...",
    )
    gpus: int | None = _field(
        None,
        "instances share this many GPUs, one beside the other, to try several on one; "
        "--mem-fraction-static has to leave room (default: each has its own)",
        least=1,
    )
    # This and the next two: only where requests are forecast (`entrypoints.answer_eta`).
    max_ttfo: float | None = _field(
        None,
        "answer 503 with Retry-After to a new request whose answer, by the median of its forecast, "
        "would begin later than this many seconds after its arrival (default: no limit)",
        above=0,
        changeable=True,
    )
    brownout: str = _field(
        "off",
        "under backlog, cap the thinking of requests without a budget of their own at this "
        "percentile of the lengths learnt here; needs --enable-strict-thinking",
        choices=("P75", "P90", "off"),
        changeable=True,
    )
    effort_budgets: str | None = _field(
        None,
        "thinking budgets in tokens for values of reasoning_effort in chats, such as "
        "low=512,high=8192; needs --enable-strict-thinking (default: none)",
        metavar="EFFORT=TOKENS,...",
        changeable=True,
    )
    pace_stream: bool = _field(
        False, "release streamed answering tokens at the reader's pace", changeable=True
    )
    log_decisions: bool = _field(
        False, "log every scheduling decision as one line of JSON", changeable=True
    )
    decision_log: str | None = _field(
        None,
        "append every scheduling decision to this file, one JSON object a line, with unix time",
        metavar="FILE",
    )
    assume_reasoning: bool = _field(
        False,
        "treat /generate requests that do not say require_reasoning as reasoning",
        changeable=True,
    )
    # A request's tenant is found in the process that serves HTTP (`entrypoints.request_notes`).
    fairness: str = _field(
        "off",
        "bound how far one tenant gets ahead of another while requests wait, by the KV that it "
        "holds; whose a request is: its API key, its `user` field, or a header that a gateway sets",
        metavar="{off,api-key,user,header:NAME}",
        changeable=True,
    )
    require: str = _field(
        "observe",
        "refuse to start where features leave less than this level; observe, the least, refuses "
        "nothing (docs/compatibility.md)",
        choices=LEVELS,
    )
    # `sglang`: the balancing of `--load-balance-method`; the launcher sets it where that flag is
    # given. Only with several instances.
    placement: str = _field("phase", choices=("phase", "sglang"))
    # Thinking tokens after which a request without a logit processor of its own is made to close
    # its thinking; None leaves requests alone. Set by `--demo`.
    default_thinking_budget: int | None = _field(None, least=0)
    # Whether clients may send logit processors, which are code, where SGLang's flag is given.
    # `--demo`, which gives it for its own ones, says no.
    client_processors: bool = _field(True)
    # For tests: the chance per pass that a running request is paused, or a paused one resumed,
    # whatever the policy says.
    chaos: float = _field(0.0, least=0, most=1)
    # For tests: no higher level than this one.
    most_level: str = _field("move", choices=LEVELS)
    # For tests: every request migrates at the end of its thinking, whatever `migration` says, and
    # with this chance per pass again.
    force_migration: float = _field(0.0, least=0, most=1)

    def __post_init__(self) -> None:
        try:
            find(self.policy)
        except UnknownPolicy as error:
            raise ConfigError(str(error)) from error
        for name, kind, optional, limits in _declared():
            value = getattr(self, name)
            if not (optional and value is None):
                _check(name, kind, value, limits)
        self._require_addresses()
        if self.effort_budgets is not None:
            _budgets(self.effort_budgets)
        if self.racks is not None:
            _racks(self.racks)
        self._require_scheduling()

    def _require_scheduling(self) -> None:
        known = self.fairness in ("off", "api-key", "user") or re.fullmatch(
            FAIRNESS_HEADER + r"[A-Za-z0-9_-]{1,64}", self.fairness
        )
        shown = f"{self.fairness!r:.60}"
        _require(bool(known), f"fairness must be off, api-key, user or header:NAME, not {shown}")
        _require(
            self.fairness == "off" or self.record.schedules,
            f"fairness is for a policy that schedules, not for {self.policy}",
        )
        _require(
            not self.tool_kv or self.record.schedules,
            f"tool_kv is for a policy that schedules, not for {self.policy}",
        )

    def _require_addresses(self) -> None:
        if self.kv_listen is not None:
            self._require_kv_listen()
        if self.control_listen is not None:
            one = is_one_address(self.control_listen)
            _require(one, f"control_listen must be one IP address, not {self.control_listen!r:.60}")
        if self.control_secret is not None:
            # A relative one is another file where a process has another folder, as Ray's have.
            path = self.control_secret
            _require(
                isinstance(path, str) and os.path.isabs(path) and "\0" not in path,
                f"control_secret must be the absolute path of a file, not {path!r:.60}",
            )
            _require(
                self.control_listen is not None,
                "control_secret is for control_listen; without it no socket needs a key",
            )

    def _require_kv_listen(self) -> None:
        """A wildcard is no address; which one a network or an interface has is known on its host
        (`cluster.transport.listening.own_address`)."""
        given = str(self.kv_listen)
        try:
            network = ipaddress.IPv4Network(given)
            first = network.network_address
            named = not (first.is_unspecified or first.is_multicast or first.is_reserved)
        except ValueError:
            named = re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,14}", given) is not None
        _require(
            named and isinstance(self.kv_listen, str),
            "kv_listen must be an IPv4 address, a network like 10.0.0.0/24 or an interface, not "
            f"{self.kv_listen!r:.60}",
        )
        _require(
            self.kv_transport == "mooncake",
            f"kv_listen is for the mooncake transport; {self.kv_transport} listens nowhere",
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

    def rack_of(self, address: str) -> str:
        """The rack of a host; none where no racks were given. Raises: ConfigError for a host that
        is in none of them."""
        if self.racks is None:
            return ""
        host = ipaddress.ip_address(address)
        found = next((rack for rack, network in _racks(self.racks) if host in network), None)
        _require(found is not None, f"--pascal-racks says no rack for the host {address}")
        return str(found)

    def stream_tpot_ms_of(self, sampling: dict[str, Any]) -> float:
        """The pace at which a streamed answer leaves; 0, at once, where a program reads it."""
        if reader_of(True, sampling) is Reader.PROGRAM:
            return 0.0
        return self.answer_tpot_ms_of(sampling.get("custom_params"))

    def problem_with_request(self, obj: Any, override: str | None = None) -> str | None:
        """What this server refuses in a request, or in a batch, that SGLang itself would take; None
        if nothing is wrong. override: the id that a header gives it."""
        if self.record.schedules:
            for rid in (getattr(obj, "rid", None), override):
                if (problem := request_ids.problem_with(rid)) is not None:
                    return problem
        if not self.paces:
            return None
        problem = request_checks.problem_with(getattr(obj, "sampling_params", None))
        if problem is None and self.tool_kv:
            problem = request_checks.problem_with_hints(getattr(obj, "kv_hints", None))
        return problem

    def budget_of_effort(self, effort: str) -> int | None:
        """The thinking budget that the operator gives to a `reasoning_effort`; None for none."""
        return None if self.effort_budgets is None else _budgets(self.effort_budgets).get(effort)

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
        if not self.places:
            return False
        return self.force_migration > 0 or self.migration_mode != "off"

    @property
    def moves_at_boundary(self) -> bool:
        """Whether they may at the end of their thinking."""
        if not self.can_migrate:
            return False
        return self.force_migration > 0 or self.migration_mode != "drain"

    @property
    def migration_mode(self) -> str:
        """`migration`, where nothing was asked for that of the policy's record."""
        if self.migration is not None:
            return self.migration
        rule = self.record.placement
        return "adaptive" if rule is not None and rule.migrates else "off"

    def support(self, server_args: Any) -> Support:
        """What this configuration and SGLang's server arguments leave. Pools may leave less."""
        return of_server(self, server_args)

    def effective(self, server_args: Any) -> PascalConfig:
        """What schedules and places with these arguments: at the level OBSERVE that is `fcfs`."""
        if self.record.schedules and self.support(server_args).level is Level.OBSERVE:
            return dataclasses.replace(self, policy="fcfs", fairness="off", tool_kv=0.0)
        return self

    def require_level(self, support: Support) -> None:
        """Raises: `LaunchError` for a server that gets less than was asked for."""
        if str(support.level) in LEVELS[: LEVELS.index(self.require)]:
            raise LaunchError(
                f"--pascal-require {self.require}: the level here is {support.level}, "
                f"because of {support.reason}"
            )

    def changed(self, values: Mapping[str, Any]) -> PascalConfig:
        """The configuration with other values for fields that may change while serving.

        Raises: ConfigError, as for a flag.
        """
        fields = {name: (kind, declared) for name, kind, _, declared in _declared()}
        unknown = sorted(set(values) - set(fields))
        _require(not unknown, f"the configuration has no {', '.join(map(ascii, unknown)):.200}")
        fixed = sorted(name for name in values if not fields[name][1]["changeable"])
        _require(not fixed, f"{', '.join(fixed)} cannot change while the server runs")
        checked = dataclasses.asdict(dataclasses.replace(self, **values))
        floats = {
            name: float(value)
            for name, value in values.items()
            if fields[name][0] is float and value is not None
        }
        return PascalConfig(**checked | floats)

    def changeable(self) -> dict[str, Any]:
        """The fields that may change while serving, and their values."""
        found = (name for name, _, _, declared in _declared() if declared["changeable"])
        return {name: getattr(self, name) for name in found}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def shown(self) -> dict[str, Any]:
        """Every value, as an operator is shown it."""
        return dataclasses.asdict(self) | {"migration": self.migration_mode}

    def banner(self) -> str:
        """The one start line: policy first, then every value."""
        values = self.shown()
        values.pop("policy")
        shown = " ".join(f"{name}={value}" for name, value in values.items())
        return f"pascal_sglang: policy={self.policy} {shown}"


def is_one_address(text: object) -> bool:
    """Whether it is the IP address of one host: no name, no wildcard, no group."""
    if not isinstance(text, str) or "%" in text:
        return False
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    address = getattr(found, "ipv4_mapped", None) or found
    reserved = address.is_reserved and not address.is_loopback
    return not (address.is_unspecified or address.is_multicast or reserved)


@functools.cache
def _declared() -> list[tuple[str, type, bool, Mapping[str, Any]]]:
    """Of every field: its name, its type, whether it may be None, and what it was declared with."""
    hints = get_type_hints(PascalConfig)
    found: list[tuple[str, type, bool, Mapping[str, Any]]] = []
    for each in dataclasses.fields(PascalConfig):
        kinds = get_args(hints[each.name]) or (hints[each.name],)
        found.append((each.name, kinds[0], type(None) in kinds, each.metadata))
    return found


@functools.cache
def _budgets(text: str) -> dict[str, int]:
    """Thinking tokens by effort. Raises: `ConfigError`."""
    found: dict[str, int] = {}
    for each in text.split(","):
        effort, _, tokens = each.strip().partition("=")
        counts = tokens.isdecimal() and len(tokens) <= len(str(MOST_TOKENS))
        fits = effort.isidentifier() and counts and effort not in found
        _require(fits, f"effort_budgets must be EFFORT=TOKENS,... with each once, not {text!r:.80}")
        found[effort] = int(tokens)
    return found


def _racks(text: str) -> list[tuple[str, Network]]:
    """Racks and their networks, each host in one of them. Raises: `ConfigError`."""
    found: list[tuple[str, Network]] = []
    for each in text.split(","):
        rack, _, given = each.strip().partition("=")
        try:
            network = ipaddress.ip_network(given)
        except ValueError:
            network = None
        fits = re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", rack) and network is not None
        _require(bool(fits), f"racks must be RACK=NETWORK,... like a=10.0.1.0/24, not {text!r:.80}")
        assert network is not None
        for _, other in found:
            same = network.version == other.version and network.overlaps(other)
            _require(not same, f"racks has {network} and {other}, which have addresses in common")
        found.append((rack, network))
    return found


def _check(name: str, kind: type, value: Any, limits: Mapping[str, Any]) -> None:
    choices, least, above, most = (limits[k] for k in ("choices", "least", "above", "most"))
    if choices:
        _require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r:.60}")
    elif kind is str:
        _require(isinstance(value, str), f"{name} must be a text, not {value!r:.60}")
    elif kind is bool:
        _require(isinstance(value, bool), f"{name} must be true or false")
    elif kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = (
            (whole or (kind is float and isinstance(value, float)))
            # No NaN, nothing endless, and no whole number that is larger than any float.
            and (kind is int or abs(value) <= sys.float_info.max)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
        )
        bounds = (("of at least", least), ("above", above), ("of at most", most))
        told = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        number = "a whole number" if kind is int else "a number"
        _require(fits, f"{name} must be {number} {told}, not {value!r:.60}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the `--pascal-*` flags; defaults are `PascalConfig`'s own."""
    group = parser.add_argument_group("pascal_sglang")
    defaults = PascalConfig()
    for name, kind, _, declared in _declared():
        text, default = declared["text"], getattr(defaults, name)
        if text is None:
            continue
        options: dict[str, Any] = {"default": default, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            options |= {"type": kind, "metavar": declared["metavar"]}
            options["choices"] = declared["choices"] or None
            if default is not None:
                options["help"] += " (%(default)s)"
        if declared["changeable"]:
            options["help"] += CHANGEABLE
        group.add_argument("--pascal-" + name.replace("_", "-"), **options)


def from_flags(options: argparse.Namespace) -> PascalConfig:
    """Build the configuration from parsed `--pascal-*` flags."""
    names = [name for name, _, _, declared in _declared() if declared["text"] is not None]
    return PascalConfig(**{name: getattr(options, f"pascal_{name}") for name in names})


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
