"""Lengths sampled from ServeGen distributions of production DeepSeek-R1 traffic.

The table beside this file holds quantiles per client; `evals.sources.servegen` derives it.
Prompt, output and reason ratio are drawn independently within a client.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pascal_sglang.sim.loads.lengths import Floats, Sampled, Whole, scaled, split

TABLE = Path(__file__).parent / "servegen_r1.json"
FIELDS = ("prompt", "output", "reason_ratio")


@dataclass(frozen=True, slots=True)
class Table:
    """Quantiles per client: `quantiles[field][client]` at `levels`. weights: share of requests."""

    levels: Floats
    weights: Floats
    quantiles: dict[str, Floats]

    def pick(self, rng: np.random.Generator, count: int) -> Whole:
        """A client per request."""
        return rng.choice(len(self.weights), count, p=self.weights)

    def sample(self, rng: np.random.Generator, field: str, clients: Whole) -> Floats:
        """A value per request of these clients, linear between quantiles."""
        values = np.empty(len(clients))
        levels = rng.random(len(clients))
        for client in np.unique(clients):
            mine = clients == client
            values[mine] = np.interp(levels[mine], self.levels, self.quantiles[field][client])
        return values


@functools.cache
def table(path: Path = TABLE) -> Table:
    """A derived table. Raises OSError, or ValueError for a file that holds none."""
    try:
        raw = json.loads(path.read_text())
        rows = raw["clients"]
        weights = np.array([row["weight"] for row in rows], dtype=float)
        columns = {f: np.array([row[f] for row in rows], dtype=float) for f in FIELDS}
        levels = np.array(raw["levels"], dtype=float)
        if not len(rows) or any(c.shape != (len(rows), len(levels)) for c in columns.values()):
            raise ValueError("rows and levels do not match")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a ServeGen table: {error!r}") from error
    return Table(levels, weights / weights.sum(), columns)


def sample(
    rng: np.random.Generator,
    count: int,
    scale: float = 1.0,
    prompt_scale: float = 1.0,
    known: Table | None = None,
) -> Sampled:
    """Requests of the table's clients; the factors are those of `lengths.Preset.sample`."""
    known = known or table()
    clients = known.pick(rng, count)
    prompt, output, ratio = (known.sample(rng, field, clients) for field in FIELDS)
    return Sampled(scaled(prompt, prompt_scale), *split(scaled(output, scale), ratio))
