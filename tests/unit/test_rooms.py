"""The walls between the rooms, and the size of what stands in them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pascal_sglang"
WALLS = {
    "policy": {"torch", "sglang", "zmq", "numpy", "transformers"},
    "sim": {"torch", "sglang", "zmq", "transformers"},
    "cluster": {"torch"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("room", WALLS)
def test_rooms_import_only_what_they_may(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in WALLS[room], f"{path} imports {name}"
            if room == "policy" and name.startswith("pascal_sglang."):
                assert name.startswith("pascal_sglang.policy"), f"{path} imports {name}"


def test_the_cluster_knows_no_engine():
    known = ("cluster", "policy", "config", "handshake")
    for path in (PACKAGE / "cluster").rglob("*.py"):
        for name in imported(path):
            room = name.removeprefix("pascal_sglang.").split(".")[0]
            assert not name.startswith("pascal_sglang.") or room in known, f"{path} imports {name}"


def test_the_policy_has_no_clock_of_its_own():
    for path in (PACKAGE / "policy").rglob("*.py"):
        assert not {"time", "random", "datetime"} & set(imported(path)), path
