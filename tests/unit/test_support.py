"""Levels: what each feature leaves, what a server makes of several, and what is refused."""

import argparse
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.arg_groups.fields.schedule import Schedule
from sglang.srt.environ import envs
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang import scheduling_flags, support
from pascal_sglang.config import ConfigError, LaunchError, PascalConfig
from pascal_sglang.entrypoints import sglang_flags
from pascal_sglang.support import EVERYTHING, LEVELS, Level, Row, Support

ROOT = Path(__file__).parents[2]
FEATURES = {
    "another --speculative-algorithm": "--speculative-algorithm DFLASH",
    "--speculative-algorithm NGRAM": "--speculative-algorithm NGRAM",
    "--speculative-eagle-topk above 1": (
        "--speculative-algorithm EAGLE --speculative-eagle-topk 2"
    ),
    "--enable-multi-layer-eagle": "--enable-multi-layer-eagle",
    "--speculative-use-rejection-sampling": "--speculative-use-rejection-sampling",
    "--speculative-adaptive": "--speculative-adaptive",
    "--pp-size above 1": "--pp-size 2",
    "--pp-size above 1 with drafts": "--pp-size 2 --speculative-algorithm EAGLE",
    "--disaggregation-mode": "--disaggregation-mode prefill",
    "--enable-hierarchical-cache": "--enable-hierarchical-cache",
    "--hicache-storage-backend": "--hicache-storage-backend file",
    "--enable-hisparse": "--enable-hisparse",
    "--enable-lmcache": "--enable-lmcache",
    "--enable-flexkv": "--enable-flexkv",
    "--enable-unified-cache-external-linker": "--enable-unified-cache-external-linker",
    "--radix-cache-backend": "--radix-cache-backend another",
    "--enable-unified-memory": "--enable-unified-memory",
    "--enable-pdmux": "--enable-pdmux",
    "--dcp-size above 1": "--dcp-size 2",
    "--attn-cp-size above 1": "--attn-cp-size 2",
    "--dllm-algorithm": "--dllm-algorithm LowConfidence",
    "--is-embedding": "--is-embedding",
    "one instance": "--dp-size 1",
    "more than one node": "--nnodes 2",
    "--tokenizer-worker-num above 1": "--tokenizer-worker-num 2",
    "--detokenizer-worker-num above 1": "--detokenizer-worker-num 2",
    "--skip-tokenizer-init": "--skip-tokenizer-init",
}
MOVES = PascalConfig(migration="adaptive")
BY_ARGUMENTS = {row.name: row for row in (*support.SERVER, *support.INSTANCES)}


@pytest.fixture(scope="module")
def arguments():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return lambda flags: parser.parse_args(["--model-path", "m", *flags.split()])


def test_every_feature_is_tried():
    assert FEATURES.keys() | {"SGLANG_RUST_SERVER"} == BY_ARGUMENTS.keys()


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_leaves_its_level(arguments, name):
    given_two = f"--dp-size 2 {FEATURES[name]}"
    assert MOVES.support(arguments(given_two)) == Support(BY_ARGUMENTS[name].level, (name,))


def test_a_front_end_in_rust_keeps_requests_where_they_are(arguments, monkeypatch):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    found = MOVES.support(arguments("--dp-size 2"))
    assert found == Support(Level.PAUSE, ("SGLANG_RUST_SERVER",))


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--page-size 64 --kv-cache-dtype fp8_e4m3 --attention-backend flashinfer",
        "--tp-size 2 --chunked-prefill-size 64 --use-ray",
        "--tp-size 2 --attn-dp-size 2",
        "--speculative-algorithm EAGLE",
        "--speculative-algorithm EAGLE3 --speculative-eagle-topk 1",
        "--speculative-algorithm STANDALONE",
    ],
)
def test_the_rest_leaves_everything(arguments, flags):
    assert MOVES.support(arguments(f"--dp-size 2 {flags}")) == EVERYTHING


@pytest.mark.parametrize(
    ("settings", "level", "name"),
    [
        ({"policy": "fcfs"}, Level.OBSERVE, "a policy in SGLang's order"),
        ({"policy": "rr"}, Level.PAUSE, "a policy that does not place requests"),
        ({"placement": "sglang"}, Level.PAUSE, "--load-balance-method"),
        ({"policy": "paper", "migration": "off"}, Level.PAUSE, "--pascal-migration off"),
        ({}, Level.PAUSE, "--pascal-migration off"),
    ],
)
def test_a_level_names_what_lowered_it(arguments, settings, level, name):
    found = PascalConfig(**settings).support(arguments("--dp-size 2"))
    assert found == Support(level, (name,))


def test_all_features_of_the_lowest_level_are_named(arguments):
    found = PascalConfig().support(arguments("--enable-lmcache --dcp-size 2 --tp-size 2"))
    assert found == Support(Level.ORDER, ("--enable-lmcache", "--dcp-size above 1"))
    assert str(found) == "order (--enable-lmcache, --dcp-size above 1)"


def test_what_is_only_observed_runs_as_fcfs(arguments):
    """Placement included, which the controller has to know as well as the schedulers."""
    config = PascalConfig(quantum_tokens=77)
    ran = config.effective(arguments("--dp-size 2 --attn-cp-size 2"))
    assert (ran.policy, ran.places, ran.can_migrate) == ("fcfs", False, False)
    assert ran.quantum_tokens == 77
    assert config.effective(arguments("--dp-size 2 --enable-lmcache")) == config


@pytest.mark.parametrize("level", Level)
def test_less_than_required_is_refused_in_one_line(level):
    for asked in LEVELS:
        config, found = PascalConfig(require=asked), Support(level, ("--some-flag",))
        if level >= Level[asked.upper()]:
            config.require_level(found)
            continue
        with pytest.raises(LaunchError) as refused:
            config.require_level(found)
        said = str(refused.value)
        assert f"--pascal-require {asked}: the level here is {level}" in said
        assert "--some-flag" in said
        assert "\n" not in said


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="require must be one of observe, order"):
        PascalConfig(require="most")


rows = st.lists(
    st.builds(
        lambda number, level, holds: Row(f"feature {number}", level, lambda _: holds),
        st.integers(0, 9),
        st.sampled_from(Level),
        st.booleans(),
    ),
    max_size=6,
)


@given(rows, rows)
def test_several_features_leave_what_the_lowest_leaves(some, more):
    found = EVERYTHING.under(some, None).under(more, None)
    holding = [row for row in (*some, *more) if row.holds(None)]
    assert found.level == min((row.level for row in holding), default=Level.MOVE)
    lowest = {row.name for row in holding if row.level == found.level}
    assert set(found.lowered_by) == (lowest if found.level < Level.MOVE else set())
    assert len(set(found.lowered_by)) == len(found.lowered_by)
    assert Support.described(found.describe()) == found
    one, other = EVERYTHING.under(some, None), EVERYTHING.under(more, None)
    both = Support.least([one, other])
    assert (both.level, set(both.lowered_by)) == (found.level, set(found.lowered_by))


@pytest.mark.parametrize(
    ("has", "name"),
    [
        ({"is_generation": False}, "a model that generates nothing"),
        (
            {"is_hybrid_ssm": True, "spec_algorithm": SpeculativeAlgorithm.EAGLE},
            "speculative decoding beside windows or recurrent states",
        ),
    ],
)
def test_a_pool_leaves_its_level(has, name):
    class SWATokenToKVPoolAllocator:
        swa_req_ring = False

    plain = {
        "is_generation": True,
        "is_hybrid_swa": False,
        "is_hybrid_ssm": False,
        "spec_algorithm": SpeculativeAlgorithm.NONE,
        "token_to_kv_pool_allocator": SWATokenToKVPoolAllocator(),
        "tp_worker": SimpleNamespace(model_runner=SimpleNamespace(prefill_aware_swa=False)),
    }
    scheduler = SimpleNamespace(**{**plain, **has})
    (row,) = [row for row in support.POOLS if row.name == name]
    assert EVERYTHING.under(support.POOLS, scheduler) == Support(row.level, (name,))


def test_every_family_has_a_pool_of_the_table():
    pools = {row.name for row in (*support.POOLS, *support.COPIES)}
    assert {name for family in support.FAMILIES for name in family.rows} <= pools


def test_every_row_says_why():
    for row in (
        *support.CONFIG,
        *support.MIGRATION,
        *support.SERVER,
        *support.POOLS,
        *support.INSTANCES,
    ):
        assert row.why, row.name
    assert all(row.why for row in support.REQUESTS)


# Of the fields that hold SGLang's scheduling flags: sizes of memory and of pools.
SIZES = {
    *("mem_fraction_static", "max_total_tokens", "page_size", "c128_page_size"),
    *("swa_full_tokens_ratio", "swa_prefix_tails", "disable_hybrid_swa_memory"),
    *("prefill_only_disable_kv_cache", "disable_chunked_prefix_cache"),
    *("max_mamba_cache_size", "mamba_full_memory_ratio", "_swa_full_tokens_ratio_explicitly_set"),
}
# They bear on metrics, on the chunks of pipeline stages, and on nothing at all.
BESIDE = {
    *("prefill_delayer_forward_passes_buckets", "prefill_delayer_wait_seconds_buckets"),
    *("enable_dynamic_chunking", "num_continuous_decode_steps"),
}


def test_every_scheduling_flag_of_sglang_is_in_the_table():
    fields = sglang_flags.known().fields
    named = [name for setting in scheduling_flags.SETTINGS for name in setting.names]
    assert len(set(named)) == len(named)
    flags = {fields[name] for name in named if name.startswith("--")}
    assert set(Schedule.__annotations__) - SIZES - BESIDE <= flags
    assert all(hasattr(envs, name) for name in named if not name.startswith("--"))


def test_every_flag_that_is_honoured_has_a_test():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", tests))
    everything = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for setting in scheduling_flags.SETTINGS:
        honoured = setting.effect is scheduling_flags.Effect.HONOURED
        assert (setting.test in defined) if honoured else not setting.test, setting.names
        assert not honoured or all(name in everything for name in setting.names), setting.names


def test_every_variable_that_is_overridden_is_named(arguments):
    given = {
        name: "1"
        for setting in scheduling_flags.SETTINGS
        for name in setting.names
        if not name.startswith("--")
    }
    said = [name for name, _ in scheduling_flags.overridden(arguments(""), Level.MOVE, given)]
    assert said == [
        "SGLANG_INIT_NEW_TOKEN_RATIO",
        "SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR",
        "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS",
        "SGLANG_RETRACT_DECODE_STEPS",
        "SGLANG_DATA_PARALLEL_BUDGET_INTERVAL",
    ]


@pytest.mark.parametrize(
    ("flags", "environ", "level", "names"),
    [
        ("", {}, Level.MOVE, []),
        ("--schedule-policy lpm", {}, Level.ORDER, ["--schedule-policy"]),
        ("--retraction-policy priority", {}, Level.PAUSE, ["--retraction-policy"]),
        ("--retraction-policy priority --enable-priority-scheduling", {}, Level.PAUSE, []),
        ("--schedule-conservativeness 2", {}, Level.ORDER, []),
        ("--schedule-conservativeness 2", {}, Level.RECOMPUTE, ["--schedule-conservativeness"]),
        ("", {"SGLANG_INIT_NEW_TOKEN_RATIO": "1"}, Level.PAUSE, ["SGLANG_INIT_NEW_TOKEN_RATIO"]),
        ("--max-queued-requests 3", {}, Level.PAUSE, []),
    ],
)
def test_what_has_no_effect_is_named(arguments, flags, environ, level, names):
    said = list(scheduling_flags.overridden(arguments(flags), level, environ))
    assert [name for name, _ in said] == names
    assert all(instead for _, instead in said)
