"""Reads the ServeGen data of one model: arrivals and lengths of every client, as distributions.

Per client `chunk-N-trace.csv` has a line `start_s,rate,cv,pattern,shape,scale` for every 600 s of a
day (requests per second; gaps Gamma or Weibull), and `chunk-N-dataset.json` histograms of input
tokens, output tokens and reason ratio (the share of the output that is reasoning), every 6 hours.
Source: https://github.com/alibaba/ServeGen, Apache-2.0.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.load.lines import WorkloadError

SLOT_S = 600
WINDOW_S = 21600
DAY_S = 86400
FIELDS = {"prompt": "input_tokens", "output": "output_tokens", "reason_ratio": "reason_ratio"}
_FILE = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values in ascending order with their probabilities."""

    values: np.ndarray
    weights: np.ndarray

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        drawn: np.ndarray = rng.choice(self.values, count, p=self.weights)
        return drawn


@dataclass(frozen=True, slots=True)
class Gaps:
    """Time between arrivals of one client in one slot. `rate`: requests per second."""

    rate: float
    pattern: str
    shape: float

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Seconds. The mean is `1 / rate`: the fitted scale strays from it where a slot has few
        arrivals, so only the fitted shape is kept."""
        if self.pattern == "Weibull":
            gaps = rng.weibull(self.shape, count) / math.gamma(1 + 1 / self.shape)
        else:
            gaps = rng.gamma(self.shape, 1 / self.shape, count)
        return gaps / self.rate


@dataclass(frozen=True, slots=True)
class Client:
    """slots: gaps by start of their 600 s. windows: histograms by start of their 6 hours, each by
    the keys of `FIELDS`. Both only where the client sent anything."""

    number: int
    slots: Mapping[int, Gaps]
    windows: Mapping[int, Mapping[str, Histogram]]

    def volume(self, window_s: int) -> float:
        """Requests in the window."""
        rates = (g.rate for at, g in self.slots.items() if at // WINDOW_S * WINDOW_S == window_s)
        return sum(rates) * SLOT_S


def read(path: Path) -> list[Client]:
    """The clients in a folder or a tar archive of the files above, by their number."""
    parts: dict[int, dict[str, str]] = {}
    for name, text in _files(path):
        found = _FILE.search(name)
        if found:
            parts.setdefault(int(found[1]), {})[found[2]] = text
    clients = []
    for number, texts in sorted(parts.items()):
        if len(texts) != 2:
            raise WorkloadError(f"{path}: chunk {number} lacks its trace or its dataset")
        clients.append(_client(number, texts["trace.csv"], texts["dataset.json"], path))
    if not any(client.slots for client in clients):
        raise WorkloadError(f"{path}: no ServeGen chunk-N-trace.csv with arrivals in it")
    return clients


def _files(path: Path) -> Iterator[tuple[str, str]]:
    try:
        if path.is_dir():
            for each in sorted(path.rglob("chunk-*")):
                yield each.name, each.read_text()
            return
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if _FILE.search(member.name) else None
                if file is not None:
                    yield member.name, file.read().decode()
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: not a readable archive of ServeGen data") from error
    except OSError as error:
        raise WorkloadError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _client(number: int, trace: str, dataset: str, path: Path) -> Client:
    slots: dict[int, Gaps] = {}
    for line, row in enumerate(csv.reader(io.StringIO(trace)), start=1):
        try:
            rate = float(row[1])
            if rate > 0:
                if row[3] not in ("Gamma", "Weibull"):
                    raise ValueError(f"pattern {row[3]!r}")
                slots[int(float(row[0]))] = Gaps(rate, row[3], float(row[4]))
        except (ValueError, IndexError) as error:
            raise WorkloadError(f"{path}: chunk-{number}-trace.csv:{line}: {error}") from error
    windows: dict[int, Mapping[str, Histogram]] = {}
    try:
        for start, texts in json.loads(dataset).items():
            # A histogram is the text of a Python dictionary; it is empty where nothing was sent.
            parsed = {name: ast.literal_eval(texts[key]) for name, key in FIELDS.items()}
            if all(parsed.values()):
                windows[int(start)] = {name: _histogram(each) for name, each in parsed.items()}
    except (ValueError, KeyError, SyntaxError, AttributeError, TypeError) as error:
        raise WorkloadError(f"{path}: chunk-{number}-dataset.json: {error!r}") from error
    for start_s in slots:
        if start_s // WINDOW_S * WINDOW_S not in windows:
            raise WorkloadError(
                f"{path}: chunk {number} has arrivals but no lengths at {start_s} s"
            )
    return Client(number, slots, windows)


def _histogram(weights: Mapping[float, float]) -> Histogram:
    pairs = sorted((value, weight) for value, weight in weights.items() if weight > 0)
    values, kept = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    return Histogram(values, kept / kept.sum())
