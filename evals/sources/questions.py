"""Prompts of public data sets, from a JSONL file or the Hugging Face hub.

They come with no output lengths; those are drawn from another source. How many tokens a prompt has
depends on the model, so `prompt_tokens` is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.load.lines import WorkloadError, json_lines
from evals.sources.draw import Ask, Draw

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class DataSet:
    """hub, subset, part: where it is on the hub. fields: names its prompt goes by, in the files of
    different publishers. lengths: the source of output lengths unless another is asked for."""

    hub: str
    subset: str | None
    part: str
    fields: tuple[str, ...]
    lengths: str = "reasoning-heavy"


DATA_SETS = {
    "math-500": DataSet("HuggingFaceH4/MATH-500", None, "test", ("problem",)),
    "gsm8k": DataSet("openai/gsm8k", "main", "test", ("question",)),
    "aime": DataSet("HuggingFaceH4/aime_2024", None, "train", ("problem", "Problem", "question")),
    "mbpp": DataSet("google-research-datasets/mbpp", "full", "test", ("prompt", "text")),
    "humaneval": DataSet("openai/openai_humaneval", None, "test", ("prompt",)),
    "arena-hard-questions": DataSet(
        "lmarena-ai/arena-hard-auto-v0.1", None, "train", ("prompt", "turns"), "arena-hard"
    ),
}


def draw(ask: Ask, known: DataSet, lengths: Draw) -> Draw:
    """Prompts in seeded order, each once before any comes again, with the outputs of `lengths`."""
    if ask.prompt_scale != 1:
        raise WorkloadError("the prompts of a data set cannot be scaled")
    every = prompts(ask, known)
    rounds = -(-ask.requests // len(every))
    order = np.concatenate([ask.extra_rng.permutation(len(every)) for _ in range(rounds)])
    texts = tuple(every[i] for i in order[: ask.requests])
    estimate = np.array([max(1, round(len(text) / CHARACTERS_PER_TOKEN)) for text in texts])
    return Draw(estimate, lengths.thinking, lengths.answer, texts=texts)


def prompts(ask: Ask, known: DataSet) -> list[str]:
    return [prompt(row, known, where) for where, row in rows(ask.path, known)]


def rows(path: Path | None, known: DataSet) -> list[tuple[str, Mapping[str, Any]]]:
    """Where each row of the data set is, and the row: of the file, or else of the hub."""
    if path is None:
        return [(f"{known.hub}, row {i}", row) for i, row in enumerate(_from_hub(known))]
    found: list[tuple[str, Mapping[str, Any]]] = list(json_lines(path))
    if not found:
        raise WorkloadError(f"{path}: no prompts in it")
    return found


def _from_hub(known: DataSet) -> list[Mapping[str, Any]]:
    try:
        # Here, because it takes seconds to import and is wanted only where there is no file.
        from datasets import load_dataset
    except ImportError as error:
        raise WorkloadError(
            "data sets of the hub need `pip install 'pascal_sglang[evals]'`; or give --path"
        ) from error
    try:
        return list(load_dataset(known.hub, known.subset, split=known.part))
    except Exception as error:  # The layers below raise of every kind when there is no network.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WorkloadError(
            f"cannot fetch {known.hub} from the hub ({reason[0][:120]}); give a file by --path"
        ) from error


def prompt(row: Mapping[str, Any], known: DataSet, where: str) -> str:
    name = next((field for field in known.fields if field in row), None)
    value = row[name] if name else None
    if name == "turns" and isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise WorkloadError(f"{where}: no prompt in field {' or '.join(known.fields)}")
    return value
