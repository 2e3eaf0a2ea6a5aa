"""Workloads sampled from ServeGen distributions: production DeepSeek-R1 traffic.

`python -m evals.sources.servegen DATA` derives the small table that is committed (`TABLE`); DATA is
the folder or archive of `servegen_data`. Nothing here replays requests: the data holds
distributions, and prompt, output and reason ratio are drawn independently within a client (with the
table) or within a client's 6 hours (with the data itself).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals.load.lines import WorkloadError
from evals.sources.draw import Ask, Draw
from evals.sources.servegen_data import DAY_S, FIELDS, SLOT_S, WINDOW_S, Client, Histogram, read
from pascal_sglang.sim.loads.lengths import scaled, split
from pascal_sglang.sim.loads.servegen import TABLE, Table, sample
from pascal_sglang.sim.loads.servegen import table as read_table

LEVELS = (0.0, 0.01, *(i / 20 for i in range(1, 20)), 0.98, 0.99, 0.995, 0.999, 1.0)


def derive(clients: Sequence[Client]) -> dict[str, object]:
    """The table of these clients, as JSON has it; windows count by the requests they had."""
    total = sum(c.volume(start) for c in clients for start in c.windows)
    rows = []
    for client in clients:
        volume = {start: client.volume(start) for start in client.windows}
        if not sum(volume.values()):
            continue
        row: dict[str, object] = {
            "client": client.number,
            "weight": round(sum(volume.values()) / total, 6),
        }
        for field in FIELDS:
            parts = [(client.windows[start][field], volume[start]) for start in volume]
            digits = 3 if field == "reason_ratio" else 0
            row[field] = [_number(v, digits) for v in quantiles(parts, LEVELS)]
        rows.append(row)
    return {
        "source": "derived from the DeepSeek-R1 workload of ServeGen (per-client distributions)",
        "url": "https://github.com/alibaba/ServeGen",
        "licence": "Apache-2.0",
        "derived_by": "python -m evals.sources.servegen",
        "meaning": "per client its share of requests, and quantiles at `levels` of prompt tokens, "
        "output tokens (reasoning included) and the share of the output that is reasoning",
        "levels": list(LEVELS),
        "clients": rows,
    }


def quantiles(parts: Sequence[tuple[Histogram, float]], levels: Sequence[float]) -> np.ndarray:
    """Of a mixture of histograms by weight: the least value with that much at or below it."""
    values = np.concatenate([part.values for part, _ in parts])
    weights = np.concatenate([part.weights * weight for part, weight in parts])
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    # Sums of many small weights miss a level by rounding; 1 would fall off the end.
    at = np.searchsorted(reached, np.asarray(levels) - 1e-9)
    found: np.ndarray = values[order][np.minimum(at, len(values) - 1)]
    return found


def _number(value: float, digits: int) -> float | int:
    return round(value, digits) if digits else round(value)


def table(path: Path = TABLE) -> Table:
    """A derived table; errors are `WorkloadError`."""
    try:
        return read_table(path)
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise WorkloadError(str(error)) from error


def thinking_share(rng: np.random.Generator, count: int) -> np.ndarray:
    """Reason ratios for sources that do not have their own."""
    known = table()
    return known.sample(rng, "reason_ratio", known.pick(rng, count))


def draw(ask: Ask) -> Draw:
    """From the committed table, another table (`.json`), or the data itself."""
    if ask.path is not None and ask.path.suffix != ".json":
        return draw_data(ask, read(ask.path))
    known = table(ask.path) if ask.path is not None else table()
    return Draw(*sample(ask.rng, ask.requests, ask.scale, ask.prompt_scale, known))


def draw_data(ask: Ask, clients: Sequence[Client]) -> Draw:
    """Clients arrive in their own way from `ask.start_s` of the day on, and every request has the
    lengths of its client at that time."""
    times_s, who = arrivals(ask.extra_rng, clients, ask.requests, ask.start_s)
    values = {field: np.empty(len(times_s)) for field in FIELDS}
    windows = (times_s % DAY_S).astype(int) // WINDOW_S * WINDOW_S
    for place, start_s in sorted(set(zip(who.tolist(), windows.tolist(), strict=True))):
        mine = (who == place) & (windows == start_s)
        for field in FIELDS:
            histogram = clients[place].windows[start_s][field]
            values[field][mine] = histogram.sample(ask.rng, int(mine.sum()))
    return _draw(ask, values["prompt"], values["output"], values["reason_ratio"], times_s)


def arrivals(
    rng: np.random.Generator, clients: Sequence[Client], count: int, start_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` arrivals of all clients together, in order: seconds after midnight of the
    first day, and whose they are. Days repeat."""
    slot_s = int(start_s) // SLOT_S * SLOT_S
    found: list[tuple[float, int]] = []
    while len(found) < count:
        for place, client in enumerate(clients):
            gaps = client.slots.get(slot_s % DAY_S)
            if gaps is None:
                continue
            at = slot_s + rng.random() * float(gaps.sample(rng, 1)[0])
            while at < slot_s + SLOT_S:
                if at >= start_s:
                    found.append((at, place))
                at += float(gaps.sample(rng, 1)[0])
        slot_s += SLOT_S
    found.sort()
    times_s, who = zip(*found[:count], strict=True)
    return np.array(times_s), np.array(who)


def _draw(
    ask: Ask,
    prompt: np.ndarray,
    output: np.ndarray,
    reason_ratio: np.ndarray,
    times_s: np.ndarray | None,
) -> Draw:
    thinking, answer = split(scaled(output, ask.scale), reason_ratio)
    return Draw(scaled(prompt, ask.prompt_scale), thinking, answer, times_s)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Derive the quantile table of ServeGen data.")
    parser.add_argument("data", type=Path, help="folder or archive of chunk-N files")
    parser.add_argument("--out", type=Path, default=TABLE)
    asked = parser.parse_args(argv)
    try:
        derived = derive(read(asked.data))
    except WorkloadError as error:
        print(f"evals: error: {error}", file=sys.stderr)
        return 2
    rows = derived.pop("clients")
    assert isinstance(rows, list)
    # One client a line: small, and a change shows where it is.
    head = json.dumps(derived, indent=1)[:-2]
    body = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
    asked.out.write_text(f'{head},\n "clients": [\n{body}\n ]\n}}\n')
    print(f"{len(rows)} clients, {asked.out.stat().st_size} bytes: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
