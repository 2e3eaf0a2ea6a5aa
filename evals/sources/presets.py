"""Log-normal lengths with the means of published data sets, as the simulator draws them too."""

from __future__ import annotations

from evals.sources.draw import Ask, Draw
from pascal_sglang.sim.loads.lengths import PRESETS, Lengths, Preset

__all__ = ["PRESETS", "Lengths", "Preset", "draw"]


def draw(preset: Preset, ask: Ask) -> Draw:
    return Draw(*preset.sample(ask.rng, ask.requests, ask.scale, ask.prompt_scale))
