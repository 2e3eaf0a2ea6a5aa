"""Runs requests on one real scheduler, which is a fork of the process that has imported SGLang."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pascal_sglang.config import CONFIG_ENV, PascalConfig
from tests.harness import Fork, environment, fork
from tests.ports import free_port

FLAGS = (
    "--device cpu --reasoning-parser qwen3 --max-running-requests 64 --log-level warning "
    "--random-seed 1 --enable-custom-logit-processor"
).split()
RUN_LIMIT_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation: `params` are SGLang's sampling parameters, `options` fields of
    `TokenizedGenerateReqInput`."""

    ids: list[int]
    params: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to; lists have an entry per request, in the order of the requests.

    finish: SGLang's finish reasons. logprobs: of the output tokens. hidden_states: the number of
    rows of each entry. status: what `GET /pascal/status` says of the instance at the end; empty
    without a configuration. kinds: names of the classes that the scheduler was built of.
    cached: tokens of the prompt that were not prefilled. loaded: those of them that the
    hierarchical cache had in host memory. spec_steps: verification passes; 0 without speculative
    decoding. free, capacity: KV tokens, the prefix cache's counted as free. log: what the process
    printed.
    """

    outputs: list[list[int]]
    finish: list[dict[str, Any] | None]
    logprobs: list[list[float]]
    hidden_states: list[list[int]]
    status: dict[str, Any]
    kinds: dict[str, Any]
    cached: list[int]
    loaded: list[int]
    spec_steps: list[int]
    free: int
    capacity: int
    log: str

    @property
    def pauses(self) -> dict[str, int]:
        return dict(self.status["pauses"])


def run(
    model: Path,
    requests: Sequence[Request],
    settings: Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
    *,
    prepare: str | None = None,
    each_pass: str | None = None,
    limit_s: float = RUN_LIMIT_S,
    **env: str,
) -> Outcome:
    """Serve `requests` by a scheduler under `settings`, those of `PascalConfig`; stock without.

    prepare: `module:function`, called before the scheduler is built.
    each_pass: `module:function`, called with the scheduler, its requests by id (`r0`, `r1`, ...)
    and the number of the pass.
    Raises: AssertionError with the process's output if a request did not end in time, or if the
    scheduler raised, SGLang's strict memory checks included.
    """
    return run_stages(
        model,
        requests,
        settings,
        flags,
        1,
        prepare=prepare,
        each_pass=each_pass,
        limit_s=limit_s,
        **env,
    )[0]


def run_stages(
    model: Path,
    requests: Sequence[Request],
    settings: Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
    stages: int = 2,
    *,
    prepare: str | None = None,
    each_pass: str | None = None,
    limit_s: float = RUN_LIMIT_S,
    **env: str,
) -> list[Outcome]:
    """The same by a scheduler of several pipeline stages, each a process; an outcome of each."""
    port = ["--pp-size", str(stages), "--nccl-port", str(free_port())] if stages > 1 else []
    with tempfile.TemporaryDirectory(prefix="inproc-") as name:
        folder = Path(name)
        asked = {
            "flags": ["--model-path", str(model), *FLAGS, *flags, *port],
            "requests": [asdict(request) for request in requests],
            "prepare": prepare,
            "each_pass": each_pass,
            "limit_s": limit_s,
        }
        more = {
            "SGLANG_PLATFORM": "pascal_cpu",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
            **env,
        }
        if stages > 1:
            # As the launcher does: SGLang refuses more ranks than NUMA nodes without it.
            more["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join("0" * stages)
        if settings is not None:
            more[CONFIG_ENV] = PascalConfig(**settings).to_json()
        started = []
        for stage in range(stages):
            job, out, log = (folder / f"{kind}{stage}" for kind in ("job", "out", "log"))
            log.touch()
            job.write_text(json.dumps({**asked, "stage": stage}))
            command = ["python", "-m", "tests.engine.inproc.one_scheduler", str(job), str(out)]
            started.append((fork(command, environment(more), Path.cwd(), log), out, log))
        try:
            codes = [_ended(process, out, limit_s + 120, stages) for process, out, _ in started]
        finally:
            for process, _, _ in started:
                process.kill()
            for process, _, _ in started:
                process.wait(60)  # How each ended is written into this folder.
        said = [log.read_text(errors="replace") for _, _, log in started]
        ends = "\n\n".join(text[-6000:] for text in said)
        assert not any(codes), f"the scheduler ended with {codes}:\n{ends}"
        outs = [json.loads(out.read_text()) for _, out, _ in started]
        return [Outcome(log=log, **out) for log, out in zip(said, outs, strict=True)]


def _ended(process: Fork, out: Path, limit_s: float, stages: int) -> int:
    """The exit code of a scheduler. A stage of several waits, once it is through, for the others to
    have taken in what it has sent."""
    deadline = time.monotonic() + limit_s
    while stages > 1 and process.poll() is None and time.monotonic() < deadline:
        if out.exists():
            return 0
        time.sleep(0.05)
    return process.wait(max(0.0, deadline - time.monotonic()))


def differing(found: Outcome, expected: Outcome) -> list[int]:
    """The requests whose output tokens or finish reasons are not the same."""
    both = zip(
        zip(found.outputs, found.finish, strict=True),
        zip(expected.outputs, expected.finish, strict=True),
        strict=True,
    )
    return [i for i, (a, b) in enumerate(both) if a != b]
