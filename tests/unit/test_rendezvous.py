"""Where ranks meet: on loopback, unless somebody said where."""

import os
import types

import pytest
from torch.distributed import rendezvous

from pascal_sglang.cluster.transport.listening import listening
from pascal_sglang.engine.rendezvous import GLOO_ENV, INIT_METHOD_ENV, meet_on_loopback
from tests.ports import free_port

HERE = {"nnodes": 1, "dist_init_addr": None, "tp_rank": 0, "pp_rank": 0}


@pytest.fixture
def instance(monkeypatch):
    """Sets what SGLang knows of a rank; the environment is as before afterwards."""
    for name in (INIT_METHOD_ENV, GLOO_ENV):
        monkeypatch.setenv(name, "x")  # So that it is put back.
        monkeypatch.delenv(name)

    def is_like(**known):
        parallel = types.SimpleNamespace(**{**HERE, **known})
        monkeypatch.setattr("pascal_sglang.engine.rendezvous.get_parallel", lambda: parallel)

    return is_like


def test_torch_meets_at_the_store_that_listens_on_loopback_alone(instance):
    instance()
    port, before = free_port(), listening()
    kept = meet_on_loopback(port)
    assert os.environ[GLOO_ENV] == "lo"
    store, rank, _ = next(rendezvous(f"{os.environ[INIT_METHOD_ENV]}?rank=0&world_size=1"))
    kept.set("said", "here")
    assert (rank, store.get("said")) == (0, b"here")
    assert listening() - before == {("127.0.0.1", port)}


def test_other_ranks_are_told_where_and_a_taken_port_is_left_to_sglang(instance):
    port = free_port()
    instance(tp_rank=1)
    assert meet_on_loopback(port) is None
    assert os.environ.pop(INIT_METHOD_ENV) == f"tcp://127.0.0.1:{port}"
    instance()
    kept = meet_on_loopback(port)
    os.environ.pop(INIT_METHOD_ENV)
    assert meet_on_loopback(port) is None
    assert kept is not None


@pytest.mark.parametrize(
    "said", [{"nnodes": 2}, {"dist_init_addr": "10.0.0.1:5000"}, {"environment": "env://"}]
)
def test_what_the_operator_says_stands(said, instance, monkeypatch):
    instance(**said)
    if "environment" in said:
        monkeypatch.setenv(INIT_METHOD_ENV, said["environment"])
    assert meet_on_loopback(free_port()) is None
    assert os.environ.get(INIT_METHOD_ENV) == said.get("environment")
    assert GLOO_ENV not in os.environ
