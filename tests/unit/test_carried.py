"""What the policies do not carry is refused by name; `fcfs` serves it."""

import argparse

import pytest
from sglang.srt.server_args import ServerArgs

from pascal_sglang import support
from pascal_sglang.config import LaunchError, PascalConfig
from pascal_sglang.entrypoints.preflight import check_policy

REFUSED = {
    "--speculative-algorithm": "--speculative-algorithm EAGLE",
    "--pp-size above 1": "--pp-size 2",
    "--enable-dp-attention": "--enable-dp-attention",
    "--disaggregation-mode": "--disaggregation-mode prefill",
    "--enable-hisparse": "--enable-hisparse",
    "--enable-lmcache": "--enable-lmcache",
    "--enable-unified-memory": "--enable-unified-memory",
    "--enable-pdmux": "--enable-pdmux",
    "--dcp-size above 1": "--dcp-size 2",
    "--attn-cp-size above 1": "--attn-cp-size 2",
    "--dllm-algorithm": "--dllm-algorithm LowConfidence",
}


def test_every_refusal_is_tried():
    refused = support.at_most(support.Level.OBSERVE, support.SERVER)
    assert REFUSED.keys() == {row.name for row in refused}


@pytest.fixture(scope="module")
def parser():
    made = argparse.ArgumentParser()
    ServerArgs.add_cli_args(made)
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_a_feature_that_is_not_carried_is_named(parser, name):
    arguments = parser.parse_args(["--model-path", "m", *REFUSED[name].split()])
    with pytest.raises(LaunchError, match=f"pascal does not work with {name} yet"):
        check_policy(PascalConfig(), arguments)
    check_policy(PascalConfig(policy="fcfs"), arguments)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--page-size 64 --kv-cache-dtype fp8_e4m3 --attention-backend flashinfer",
        "--tp-size 2 --dp-size 4 --chunked-prefill-size 64 --use-ray",
        "--enable-hierarchical-cache",
    ],
)
def test_the_rest_is_not(parser, flags):
    check_policy(PascalConfig(), parser.parse_args(["--model-path", "m", *flags.split()]))
