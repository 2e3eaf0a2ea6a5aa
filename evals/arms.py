"""The arms of a comparison: their TOML, and the server of each.

Arms are started by command line and spoken to over HTTP, as any user would.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from evals import workload
from evals.load.items import Item
from evals.load.server import START_TIMEOUT_S, ArmError, Server, environment
from evals.workload import PLAIN, Recipe, Shape, shape_of

COMMANDS = {"stock": "sglang.launch_server", "pascal": "pascal_sglang.launch_server"}
# Runs either with SGLang imported once for all processes of a server.
FORKED = "pascal_sglang.demo.forked"
# Stock SGLang has no platform for a CPU without AMX; it gets ours, and nothing else of ours.
STOCK_ON_CPU = {"SGLANG_PLATFORM": "pascal_cpu"}
TINY, TINY_WIDE = "tiny", "tiny-wide"
BUILD_TIMEOUT_S = 300
ROLES = ("stock", "candidate", "oracle")
# In flags: where the EAGLE head of the plan's tiny model is.
DRAFT = "{draft}"
# The server itself ends thinking where a request says.
STRICT = "--enable-strict-thinking"
PROCESSOR = "from pascal_sglang.demo.budget import {name}; print({name}.to_str())"
TARGETS = {
    "mean_ttfo": 0.6,
    "p99_slowdown": 0.35,
    "best_bin": 0.28,
    "worst_bin": 1.3,
    "throughput": 0.97,
    "violations": 0.01,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """`kv_tokens`: its own KV capacity in tokens, or None for the plan's."""

    name: str
    command: str
    role: str
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.command not in COMMANDS:
            raise ArmError(f"arm {self.name}: command must be one of {', '.join(COMMANDS)}")
        if self.role not in ROLES:
            raise ArmError(f"arm {self.name}: role must be one of {', '.join(ROLES)}")
        object.__setattr__(self, "flags", tuple(self.flags))


@dataclass(frozen=True, slots=True)
class Rate:
    """A load in requests per second; in overload, violations are judged against round robin."""

    name: str
    per_s: float
    overload: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.per_s < math.inf:
            raise ArmError(f"rate {self.name}: per_s must be positive, not {self.per_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole comparison, as its TOML gives it.

    model: `tiny`, `tiny-wide` with heads of 128, or one of `pascal_sglang.demo.dummy`, which has no
    weights: its flags say `--load-format dummy`. sampling: SGLang's sampling parameters of every
    request, beside what the workload needs. scale, prompt_scale: factors on output and on prompt
    lengths. shape: what else the load is like, as in `evals/scenarios`. flags: of every arm;
    `{draft}` stands for an EAGLE head of a tiny model. pascal_flags: for arms of command `pascal`.
    targets: ratios to the best stock arm that the verdict asks for, by the names of `TARGETS`;
    `violations` is a share of requests. sustained_per_s: requests per second that the first arm
    sustained where the rates were chosen; elsewhere they are scaled to what it sustains there. 0:
    they stand as they are.
    """

    preset: str
    requests: int
    seeds: int
    kv_tokens: int
    target_tpot_ms: float
    flags: tuple[str, ...]
    arms: tuple[Arm, ...]
    rates: tuple[Rate, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    model: str = TINY
    pascal_flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    goodput_ms: Mapping[str, float] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=lambda: dict(TARGETS))
    scale: float = 1.0
    prompt_scale: float = 1.0
    shape: Shape = PLAIN
    bins: int = 4
    sustained_per_s: float = 0.0
    request_timeout_s: float = 300.0
    run_timeout_s: float = 600.0
    start_timeout_s: float = START_TIMEOUT_S

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            raise ArmError(f"no such target: {', '.join(unknown)}")
        for name in ("requests", "seeds", "bins", "kv_tokens", "target_tpot_ms"):
            if not getattr(self, name) > 0:
                raise ArmError(f"{name} must be positive, not {getattr(self, name)}")
        if self.shape.programs or self.shape.interactive:
            raise ArmError("a live load has no programs and no interactive requests in its shape")
        if not 0 <= self.sustained_per_s < math.inf:
            raise ArmError(f"sustained_per_s must be a rate, not {self.sustained_per_s}")

    def items(self, per_s: float, seed: int) -> list[Item]:
        """The requests of a run at `per_s` requests per second."""
        shape = self.shape
        on_s, off_s = shape.burst_s or (1.0, 0.0)
        return workload.build(
            Recipe(
                source=self.preset,
                requests=self.requests,
                rate=per_s,
                seed=seed,
                scale=self.scale,
                prompt_scale=self.prompt_scale,
                arrivals="burst" if shape.burst_s else "gamma",
                cv=shape.cv,
                burst_on_s=on_s,
                burst_off_s=off_s,
                turns=shape.turns,
                pause_s=shape.pause_s,
                fits=shape.fits,
            )
        )

    def scaled_to(self, sustained_per_s: float) -> Plan:
        """The plan for a machine on which the first arm sustains `sustained_per_s`."""
        factor = sustained_per_s / self.sustained_per_s
        rates = [dataclasses.replace(r, per_s=round(factor * r.per_s, 2)) for r in self.rates]
        return dataclasses.replace(self, rates=tuple(rates), sustained_per_s=sustained_per_s)

    def describe(self) -> list[str]:
        """What is run, in lines."""
        capacity = f"KV capacity {self.kv_tokens} tokens" + "".join(
            f", {arm.name} {arm.kv_tokens}" for arm in self.arms if arm.kv_tokens
        )
        return [
            f"{capacity}; {self.preset} x{self.scale:g}, "
            + (f"prompts x{self.prompt_scale:g}, " if self.prompt_scale != 1 else "")
            + f"{self.requests} requests a run, "
            f"{self.seeds} {'seed' if self.seeds == 1 else 'seeds'}, reader's pace "
            f"{self.target_tpot_ms:g} ms a token",
            *([f"sampling: {dict(self.sampling)}"] if self.sampling else []),
            *([f"shape: {shaped}"] if (shaped := _differs(self.shape, PLAIN)) else []),
            self.loads(),
        ]

    def loads(self) -> str:
        return "loads: " + ", ".join(f"{rate.name} {rate.per_s:g}/s" for rate in self.rates)


def _differs(shape: Shape, usual: Shape) -> dict[str, Any]:
    told, others = dataclasses.asdict(shape), dataclasses.asdict(usual)
    return {name: value for name, value in told.items() if value != others[name]}


def load_plan(path: Path, *, quick: bool = False, **overrides: Any) -> Plan:
    """Read `path`; its `[quick]` table and then `overrides` that are not None replace values.

    `arms` and `rates` there are names to keep, in the file's order.
    """
    values = tomllib.loads(path.read_text())
    if missing := [name for name in ("arm", "rate", "flags") if not values.get(name)]:
        raise ArmError(f"nothing under {', '.join(missing)}")
    quick_values = values.pop("quick", {})
    fewer = quick_values if quick else {}
    fewer |= {key: value for key, value in overrides.items() if value is not None}
    arms = [Arm(**arm) for arm in values.pop("arm")]
    rates = [Rate(**rate) for rate in values.pop("rate")]
    values["arms"] = _named(arms, fewer.pop("arms", None), "arm")
    values["rates"] = _named(rates, fewer.pop("rates", None), "rate")
    values["shape"] = shape_of(values.pop("shape", {}))
    values["flags"] = tuple(values["flags"])
    values["pascal_flags"] = tuple(values.get("pascal_flags", ()))
    return Plan(**{**values, **fewer})


def _named(known: list[Any], wanted: list[str] | None, kind: str) -> tuple[Any, ...]:
    missing = sorted(set(wanted or ()) - {each.name for each in known})
    if missing:
        raise ArmError(f"no such {kind}: {', '.join(missing)}")
    return tuple(each for each in known if wanted is None or each.name in wanted)


def model_folder(model: str, folder: Path) -> Path:
    """Build a plan's model in `folder`, unless it is there; returns where it is.

    Raises: OSError if another command does not come to an end with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{model}.lock", timeout=BUILD_TIMEOUT_S):
        if model not in (TINY, TINY_WIDE):
            # Its configuration is written last.
            if not (folder / model / "config.json").exists():
                _python("-m", "pascal_sglang.demo.dummy", model, str(folder / model))
        elif not (folder / model / "model.safetensors").exists():
            wide = ["--wide"] if model == TINY_WIDE else []
            _python("-m", "pascal_sglang.demo.tiny", str(folder / model), *wide)
    return folder / model


def models(plan: Plan, folder: Path) -> Path:
    """Build what a plan's servers load in `folder`, unless it is there; returns where its model is.

    Raises: OSError as `model_folder`.
    """
    model = model_folder(plan.model, folder)
    if any(DRAFT in flag for flag in plan.flags):
        head = _draft_of(model)
        with FileLock(f"{head}.lock", timeout=BUILD_TIMEOUT_S):
            if not (head / "model.safetensors").exists():
                shutil.rmtree(head, ignore_errors=True)  # Of one that was interrupted.
                _python("-m", "pascal_sglang.demo.eagle", str(model), str(head))
    return model


def _draft_of(model: Path) -> Path:
    return model.parent / f"{model.name}-eagle"


def processor_of(plan: Plan) -> str:
    """The serialized processor that goes with every request of a plan. Empty where the server ends
    thinking by itself, as it must under speculative decoding: no processor acts on drafts."""
    return "" if STRICT in plan.flags else logit_processor(plan.model)


@functools.cache
def logit_processor(model: str) -> str:
    """The serialized processor that makes a plan's model think for exactly its budget."""
    name = "TinyThinkingBudget" if model in (TINY, TINY_WIDE) else "DummyThinkingBudget"
    return _python("-c", PROCESSOR.format(name=name)).splitlines()[-1]


def _python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment({})
    )
    if done.returncode:
        raise ArmError(f"python {' '.join(arguments)}:\n{done.stderr[-2000:]}")
    return done.stdout


def command_line(arm: Arm, plan: Plan, model: Path) -> list[str]:
    """How to start the arm, without its address."""
    shared = (*plan.flags, *(plan.pascal_flags if arm.command == "pascal" else ()))
    places = {
        "model": model,
        "draft": _draft_of(model),
        "kv_tokens": arm.kv_tokens or plan.kv_tokens,
        "target_tpot_ms": f"{plan.target_tpot_ms:g}",
    }
    flags = [flag.format_map(places) for flag in (*shared, *arm.flags)]
    return [sys.executable, "-m", COMMANDS[arm.command], *flags]


def command_env(arm: Arm, plan: Plan) -> dict[str, str]:
    """What the arm's server finds in its environment."""
    on_cpu = arm.command == "stock" and "cpu" in plan.flags
    return {**plan.env, **(STOCK_ON_CPU if on_cpu else {}), **arm.env}


def serve(arm: Arm, plan: Plan, model: Path, *, forked: bool = False) -> Server:
    """The arm's server, which starts now; its context waits until it answers. forked: its processes
    are forks of one, which is for a CPU alone."""
    command, env = command_line(arm, plan, model), command_env(arm, plan)
    if forked:
        command.insert(command.index("-m") + 1, FORKED)
    return Server(arm.name, command, env, plan.start_timeout_s)
