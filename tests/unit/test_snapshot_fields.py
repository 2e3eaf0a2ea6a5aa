"""Every field of a request is decided on: SGLang's of the installed version, and ours."""

import ast
import dataclasses
import inspect
from array import array

import msgspec
import pytest
from sglang.srt.dllm.mixin.req import ReqDllmMixin
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ReqLogprob
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams

from pascal_sglang.engine.migration import snapshot_fields as fields
from pascal_sglang.engine.migration.request_snapshot import why_not_migratable
from pascal_sglang.policy.request import RequestState
from pascal_sglang.seams import installed, load_seams, supported_versions
from pascal_sglang.support import of_request


def in_all(table):
    return [name for names in table.values() for name in names]


def of(kind):
    return {field.name for field in dataclasses.fields(kind)}


def set_by(kind):
    """Attributes that any method of a class sets."""
    tree = ast.parse(inspect.getsource(kind))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def request():
    return Req("r", None, array("q", [1]), SamplingParams(max_new_tokens=5), vocab_size=9)


def arrived(**params):
    req = request()
    for name, value in params.items():
        setattr(req.sampling_params, name, value)
    req.pascal_support = of_request(req)
    return req


# Of older releases: what `older_sglang` gives the name that the newest has for it.
RENAMED = {
    "prefix_indices",
    "extend_range",
    "lock_receipt",
    "swa_prefix_lock_released",
    "mamba_lazy_is_insert",
}
IS_NEWEST = installed().version == supported_versions(load_seams())[-1]


def assert_decided(found, *decided):
    names = [name for some in decided for name in some]
    assert sorted(names) == sorted(set(names)), "decided on twice"
    if IS_NEWEST:
        assert set(names) - found == set(), "not in this SGLang"
    else:
        found = found - RENAMED
    assert found - set(names) == set(), "neither carried, rebuilt nor refused: decide on it"


def test_every_field_of_a_request_is_decided_on():
    found = set(vars(request())) | set_by(Req) | set_by(ReqDllmMixin)
    carried = (fields.GIVEN, fields.PLAIN, fields.SHAPED)
    assert_decided(found, *carried, in_all(fields.REBUILT), in_all(fields.REFUSED))


def test_every_field_of_its_parts_is_decided_on():
    assert_decided(of(ReqKvInfo), fields.KV_REBUILT, in_all(fields.KV_REFUSED))
    assert_decided(
        of(ReqLogprob),
        fields.LOGPROB_GIVEN,
        fields.PROMPT_LOGPROBS,
        fields.OUTPUT_LOGPROBS,
        in_all(fields.LOGPROB_REFUSED),
    )
    assert_decided(of(SchedulerReqTimeStats), fields.TIMES, in_all(fields.TIMES_REBUILT))
    assert len(msgspec.to_builtins(SamplingParams())) == len(SamplingParams.__struct_fields__)


def test_every_field_of_our_own_is_decided_on():
    """`PhaseTimeline` and `Pacer` travel whole."""
    carried = ("pacer", "phase", "phase_tokens", "total_tokens", "credit")
    made_here = (
        *("seq", "handle", "pausable", "keeps_kv", "recomputes"),
        *("internal", "reader", "priority", "tenant"),
    )
    of_its_place = ("status", "since", "since_pass", "kv_tokens", "remaining", "head_start")
    of_its_place += ("ran_from", "ticket", "priority_class")
    assert_decided(of(RequestState), carried, made_here, of_its_place)


@pytest.mark.parametrize("value", [None, False, 0, -1, "", [], (), {}, array("q")])
def test_what_sglang_starts_a_field_with_is_not_set(value):
    assert not fields.is_set(value)


@pytest.mark.parametrize("value", [True, 1, "x", [0], array("q", [0]), object(), 0.5])
def test_anything_else_is_set(value):
    assert fields.is_set(value)


def test_a_request_in_which_a_refused_field_is_set_stays():
    assert why_not_migratable(arrived()) is None
    for part, refused in (
        (lambda req: req, fields.REFUSED),
        (lambda req: req.kv, fields.KV_REFUSED),
        (lambda req: req.logprob, fields.LOGPROB_REFUSED),
    ):
        for name in in_all(refused):
            req = arrived()
            if not IS_NEWEST and part(req) is req.kv and name not in of(ReqKvInfo):
                continue
            setattr(part(req), name, [object()])
            assert why_not_migratable(req) is not None, name
    req = arrived()
    req.logprob.input_top_logprobs_val_flat = object()
    req.input_logprob_sent = True
    assert why_not_migratable(req) is None, "what is sent is not read again"
    assert why_not_migratable(arrived(watermark=object())) == "a watermark"
