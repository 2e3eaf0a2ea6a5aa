"""Older releases look like the newest: patches of their sources, and which releases there are."""

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
import traceback
from pathlib import Path

import pytest

from pascal_sglang import older_sglang
from pascal_sglang.older_sglang.source_patch import patch
from pascal_sglang.seams import (
    ABSENT,
    SourceTree,
    installed,
    load_seams,
    supported_versions,
    version_order,
)

ROOT = Path(__file__).parents[2]
# Nothing of ours calls them where they are not.
NOT_MADE_UP_FOR = {
    "sglang.srt.managers.schedule_batch:Req.update_self_opened_reasoning_tokens",
    "sglang.srt.platforms.interface:SRTPlatform.support_mamba_cache_extra_buffer",
    "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.release_swa_prefix_lock",
    # Where they are called, they are.
    "sglang.kernels.ops.speculative.spec_tree:build_tree_kernel_efficient_func",
    "sglang.kernels.ops.speculative.spec_tree:verify_tree_greedy_func",
    "sglang.kernels.ops.speculative.cache_locs:assign_draft_cache_locs_contiguous_func",
}
SOURCE = """
import contextlib

FACTOR = 2


class C:
    @staticmethod
    def twice(x):
        return FACTOR * x

    def f(self, x):
        # A comment.
        y = self.twice(x)
        return y

    @classmethod
    def g(cls, x):
        return cls().f(x)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "to_patch.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("to_patch")
    del sys.modules["to_patch"]


def test_a_patched_function_differs_by_its_hunks(module):
    made = module.C()
    patch(module.C, "f", ("return y", "return y + FACTOR"))
    assert made.f(5) == 12
    module.FACTOR = 3  # It lives in its module.
    assert made.f(5) == 18
    patch(module.C, "g", ("cls().f(x)", "-cls().f(x)"))
    assert module.C.g(5) == -18


def test_a_later_step_patches_what_an_earlier_one_made(module):
    patch(module.C, "f", ("return y", "return y + 1"))
    patch(module.C, "f", ("y + 1", "y + 1, x"))
    assert module.C().f(5) == (11, 5)


def test_a_patched_function_can_have_another_name(module):
    patch(module.C, "f", ("def f(", "def _f("), named="_f")
    assert module.C()._f(5) == module.C().f(5) == 10


def test_a_text_that_is_not_there_is_an_error(module):
    with pytest.raises(LookupError, match="f has no 'return z'"):
        patch(module.C, "f", ("return z", ""))


def test_tracebacks_point_into_sglangs_file(module):
    line = SOURCE.splitlines().index("        y = self.twice(x)") + 1
    patch(module.C, "f", ("self.twice(x)", "self.no_such(x)"))
    try:
        module.C().f(1)
    except AttributeError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
    assert (where.filename, where.lineno) == (module.__file__, line)


def test_there_is_a_step_for_every_release_but_the_oldest():
    versions = supported_versions(load_seams())
    assert [target for target, _ in older_sglang.STEPS] == versions[1:]
    for seam in load_seams():
        assert seam.until is None or seam.until in versions[:-1], seam.symbol
        assert set(seam.digests) <= set(versions), seam.symbol


def test_the_range_of_the_package_is_what_is_recorded():
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'"sglang>=([\d.]+),<=([\d.]+)"', text)
    versions = supported_versions(load_seams())
    assert list(found.groups()) == [versions[0], versions[-1]]
    readme = (ROOT / "README.md").read_text()
    assert f"{versions[0]} to {versions[-1]}" in readme


def test_only_the_steps_that_are_needed_are_taken():
    """`tests/conftest.py` has asked for all of them."""
    for target, parts in older_sglang.STEPS:
        newer = version_order(target) > version_order(installed().version)
        for name in parts:
            taken = getattr(sys.modules.get(name), older_sglang.TAKEN, set())
            assert (target in taken) is (newer and not name.startswith("sglang.srt.ray")), name


def test_what_this_release_lacks_is_made_up_for():
    version = installed().version
    lacking = {s.symbol for s in load_seams() if s.digests.get(version) == ABSENT}
    for symbol in lacking - NOT_MADE_UP_FOR:
        pkgutil.resolve_name(symbol)


def test_what_is_made_up_takes_what_the_newest_takes():
    """Its files lie behind those of an older release under `run.sh --sglang`."""
    there = importlib.metadata.distributions(name="sglang")
    trees = [SourceTree(Path(str(each.locate_file(""))), each.version) for each in there]
    newest = max(trees, key=lambda tree: version_order(tree.version))
    version = installed().version
    for seam in load_seams():
        lacks = seam.digests.get(version) == ABSENT and seam.concerns(newest.version)
        if not lacks or seam.symbol in NOT_MADE_UP_FOR:
            continue
        symbol = newest.find(seam)
        assert symbol is not None, seam.symbol
        made, arguments = pkgutil.resolve_name(seam.symbol), symbol.node.args
        if made is None:
            continue  # Never called: what it is about is left to SGLang there.
        most = len(arguments.posonlyargs + arguments.args)
        defaults = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        named = {each.arg: default for each, default in defaults}
        needed = {name: default for name, default in named.items() if default is None}
        signature = inspect.signature(made)
        try:
            signature.bind(*[None] * (most - len(arguments.defaults)), **needed)
            signature.bind(*[None] * most, **named)
        except TypeError as error:
            raise AssertionError(f"{seam.symbol}{signature}: {error}") from error


def test_the_scheduler_has_the_extension_points_of_the_newest():
    from sglang.srt.managers.data_parallel_controller import DataParallelController
    from sglang.srt.managers.scheduler import Scheduler

    for owner, name, arguments in (
        (Scheduler, "_create_generation_req", ["self", "recv_req", "args", "kwargs"]),
        (Scheduler, "_should_defer_prefill", ["self", "running_batch"]),
        (DataParallelController, "_record_scheduler_init_infos", ["self", "infos"]),
        (DataParallelController, "get_init_info", ["self"]),
    ):
        assert list(inspect.signature(getattr(owner, name)).parameters) == arguments


def test_a_request_keeps_its_prefix_its_end_and_its_lock():
    from array import array

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.sampling.sampling_params import SamplingParams

    req = Req("r", None, array("q", [1, 2, 3]), SamplingParams(max_new_tokens=5), vocab_size=9)
    assert (req.prefix_len, req.extend_end, req.lock) == (0, None, None)
    req.prefix_len, req.extend_end = 2, 3
    assert (req.prefix_len, req.extend_end) == (2, 3)
    req.kv.cache_inserted_len = 0
    req.refresh_fill_ids()
    assert list(req.get_fill_ids()) == [1, 2, 3]
    assert callable(BasePrefixCache.lock)
    assert callable(BasePrefixCache.unlock)
