"""The walls between the rooms: what each imports of this package, and of others. No circle."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("pascal_sglang", "evals")
    for path in (ROOT / package).rglob("*.py")
}
ENTRY = {"clock", "config", "handshake", "instances"}
# Rooms by their folder, or the name of a file on the top floor: the rooms of this package that each
# may import, and the libraries.
PACKAGE = {
    "policy": (set(), set()),
    "sim": ({"policy"}, {"numpy"}),
    "cluster": (
        {"policy", "support", *ENTRY},
        {
            *{"mooncake", "msgspec", "orjson", "packaging", "prometheus_client", "psutil"},
            *{"sglang", "zmq"},
        },
    ),
    "engine.kv": (
        {"clock", "engine", "instances", "policy"},
        {"sgl_kernel", "sglang", "torch", "triton"},
    ),
    "engine.observability": (
        {"clock", "cluster", "engine", "policy", "support"},
        {"prometheus_client", "sglang"},
    ),
    "engine.migration": (
        {
            *{"cluster", "engine", "engine.kv", "engine.observability", "policy", "support"},
            *ENTRY,
        },
        {"msgspec", "sglang", "torch"},
    ),
    "engine": (
        {
            *{"cluster", "demo", "engine.kv", "engine.migration", "engine.observability"},
            *{"entrypoints", "policy", "request_checks", "scheduling_flags", "support", *ENTRY},
        },
        {"msgspec", "psutil", "sglang", "torch", "zmq"},
    ),
    "entrypoints": (
        {
            *{"cluster", "older_sglang", "platforms", "policy", "request_checks", "support"},
            *ENTRY,
        },
        {"fastapi", "psutil", "ray", "sglang", "starlette"},
    ),
    "streaming": ({"clock", "config", "entrypoints"}, {"sglang"}),
    "older_sglang": ({"seams"}, {"msgspec", "sglang"}),
    "platforms": ({"older_sglang"}, {"sglang", "torch", "xgrammar"}),
    "demo": (
        {"config", "entrypoints", "launch_server"},
        {"filelock", "psutil", "safetensors", "sglang", "tokenizers", "torch", "transformers"},
    ),
}
# Of the package, a command that measures knows the benchmarks of its parts alone, a GPU's copies
# without a server, and the workloads that it shares with the simulator.
EVALS = {
    "bench": {"cluster", "config", "engine", "engine.kv", "engine.observability", "policy", "sim"},
    "gpu": {"engine.kv"},
    "sources": {"sim"},
    "": {"sim"},
}


def imported(name):
    """Modules of ours, and names of other libraries."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            both = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (b if b in FILES else node.module for b in both)


def room_of(name):
    """`policy` for `pascal_sglang.policy.plan`; the file's name on the top floor."""
    parts = name.split(".")[1:]
    while parts and not (ROOT / name.split(".")[0]).joinpath(*parts).is_dir():
        if len(parts) == 1:
            return "" if name.startswith("evals") else parts[0]
        parts.pop()
    inner = parts[:2] if parts[:1] == ["engine"] else parts[:1]
    return ".".join(inner)


def test_there_is_no_import_circle():
    """Imports inside functions and those for types alone count too; a package's own file is left
    out, which Python imports before whatever is in the package."""
    graph = {
        name: {other for other in imported(name) if other in FILES and other != name}
        for name in FILES
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("room", PACKAGE)
def test_rooms_import_only_what_they_may(room):
    ours, theirs = PACKAGE[room]
    names = [n for n in FILES if n.startswith("pascal_sglang.") and room_of(n) == room]
    assert names
    for name in names:
        for other in imported(name):
            if other.startswith("pascal_sglang"):
                assert room_of(other) in {room, *ours}, f"{name} imports {other}"
            elif (library := other.split(".")[0]) not in sys.stdlib_module_names:
                assert library in theirs, f"{name} imports {other}"


def test_every_folder_is_a_room():
    assert {
        room_of(n) for n in FILES if n.startswith("pascal_sglang.") and n.count(".") > 1
    } == set(PACKAGE)


def test_measuring_needs_no_engine():
    for name in (n for n in FILES if n.startswith("evals.")):
        for other in imported(name):
            if other.startswith("pascal_sglang"):
                may = EVALS.get(room_of(name), set())
                assert room_of(other) in may, f"{name} imports {other}"


def test_the_policy_has_no_clock_of_its_own():
    for name in FILES:
        if name.startswith("pascal_sglang.policy."):
            assert not {"time", "random", "datetime"} & set(imported(name)), name


def test_there_is_one_clock():
    """The simulator, which imports the policy alone, times its own runs."""
    for name in (n for n in FILES if n.startswith("pascal_sglang.")):
        if room_of(name) not in ("clock", "sim"):
            text = FILES[name].read_text()
            assert "time.perf_counter(" not in text, name
            assert "time.monotonic(" not in text, name
