"""The registry of workload sources: where prompts and lengths come from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from evals.load.lines import WorkloadError
from evals.sources import azure, mooncake, presets, questions, servegen
from evals.sources.draw import Ask, Draw


@dataclass(frozen=True, slots=True)
class Source:
    """draw: may raise `WorkloadError`. origin: what to say of its numbers. path: whether one must
    be given (True), may be (None) or is refused (False). lengths: of a data set of prompts, the
    source of its output lengths unless another is asked for."""

    draw: Callable[[Ask], Draw]
    origin: str
    path: bool | None
    lengths: str | None = None


def _questions(name: str, ask: Ask) -> Draw:
    known = questions.DATA_SETS[name]
    lengths = find(ask.lengths or known.lengths)
    if lengths.path or lengths.lengths:
        raise WorkloadError(f"output lengths cannot come from {ask.lengths}")
    return questions.draw(ask, known, lengths.draw(dataclasses.replace(ask, path=None)))


SOURCES = {
    **{
        name: Source(functools.partial(presets.draw, preset), "log-normal lengths", False)
        for name, preset in presets.PRESETS.items()
    },
    "servegen-r1": Source(servegen.draw, "lengths sampled from ServeGen distributions", None),
    "mooncake": Source(
        mooncake.draw, "Mooncake trace; thinking share sampled from ServeGen distributions", True
    ),
    "azure": Source(
        azure.draw, "Azure trace; thinking share sampled from ServeGen distributions", True
    ),
    **{
        name: Source(
            functools.partial(_questions, name),
            f"prompts of {known.hub.partition('/')[2]}",
            None,
            known.lengths,
        )
        for name, known in questions.DATA_SETS.items()
    },
}


def find(name: str) -> Source:
    if name not in SOURCES:
        raise WorkloadError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    return SOURCES[name]


def origin(name: str, lengths: str | None) -> str:
    """Where the numbers of a workload come from, in words."""
    source = find(name)
    chosen = lengths or source.lengths
    return source.origin + (f"; outputs of {chosen}: {find(chosen).origin}" if chosen else "")


def draw(name: str, ask: Ask) -> Draw:
    """What the source gives; `WorkloadError` where it cannot."""
    source = find(name)
    if source.path and ask.path is None:
        raise WorkloadError(f"{name} needs a file: --path")
    if source.path is False and ask.path is not None:
        raise WorkloadError(f"{name} takes no path")
    if ask.lengths and not source.lengths:
        raise WorkloadError(f"{name} has its own lengths; only data sets of prompts take others")
    return source.draw(ask)
