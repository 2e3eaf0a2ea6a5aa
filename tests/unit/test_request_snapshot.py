"""A request's state: what comes out elsewhere is what went in, and nothing else is taken."""

import subprocess
import sys
import types
from array import array

import msgspec
import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.logprob_result_processor import (
    SchedulerLogprobResultProcessor,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from pascal_sglang import clock
from pascal_sglang.cluster.messages import MAX_STATE_BYTES
from pascal_sglang.engine.migration.request_snapshot import (
    VERSION,
    BadSnapshot,
    RequestSnapshot,
    export_state,
    import_state,
    on_this_clock,
    read_snapshot,
    restore_state,
    why_not_migratable,
)
from pascal_sglang.engine.migration.snapshot_fields import (
    GIVEN,
    OUTPUT_LOGPROBS,
    PLAIN,
    PROMPT_LOGPROBS,
    TIMES,
)
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.request import RequestState
from pascal_sglang.policy.timeline import Phase, PhaseTimeline
from pascal_sglang.support import of_request

PROMPT, OUTPUT = [5, 6, 7, 8], [9, 10, 11]
KV = len(PROMPT) + len(OUTPUT) - 1
LONGEST = 4096
SCHEDULER = types.SimpleNamespace(
    model_config=types.SimpleNamespace(hf_eos_token_id={1}, vocab_size=300),
    disaggregation_mode=DisaggregationMode.NULL,
    metrics_reporter=types.SimpleNamespace(enable_metrics=False),
    tokenizer=None,
)


def request(**more):
    params = SamplingParams(max_new_tokens=50, temperature=0, stop=["ab"], stop_token_ids=[2, 3])
    params.normalize(types.SimpleNamespace(encode=lambda text, **_: list(text)))
    custom = {"thinking_budget": 2, "pascal": {"answer_tpot_ms": 40}, "own": {"float": "1"}}
    params.custom_params = custom
    req = Req(
        "r",
        None,
        array("q", PROMPT),
        params,
        return_logprob=True,
        top_logprobs_num=1,
        stream=True,
        require_reasoning=True,
        custom_logit_processor="processor",
        eos_token_ids={1},
        vocab_size=300,
        **more,
    )
    req.output_ids = array("q", OUTPUT)
    req._is_reasoning_over, req.reasoning_tokens = True, 2
    req.input_logprob_sent = True
    req.init_incremental_detokenize()
    req.send_token_offset = req.send_output_token_logprobs_offset = 2
    req.send_decode_id_offset = len(PROMPT) + 2
    req.cached_tokens = 3
    req.time_stats.forward_entry_time = 12.5
    req.logprob.input_token_logprobs_val = [None, -0.25, float("-inf"), -2.0]
    req.logprob.input_token_logprobs_idx = PROMPT
    req.logprob.input_top_logprobs_val = [None, [-0.25], [-1.0], [-2.0]]
    req.logprob.input_top_logprobs_idx = [None, [6], [7], [8]]
    req.logprob.output_token_logprobs_val = [-0.5, float("-inf"), float("-inf")]
    req.logprob.output_token_logprobs_idx = OUTPUT
    req.logprob.output_top_logprobs_val = [[-0.5], [None], [float("nan")]]
    req.logprob.output_top_logprobs_idx = [[9], [10], [11]]
    req.pascal_timeline = PhaseTimeline(1.0, 1.5, 2.0, 2.5, 2.5, None, 2, 1)
    req.pascal_timeline.stopped("paused", 2.6)
    req.pascal_timeline.stopped("moved", 3.5)
    pacer = Pacer(0.04, 1, 2.5, 2.5, 0.0)
    req.pascal_state = RequestState(
        seq=4, pacer=pacer, phase=Phase.ANSWERING, phase_tokens=1, credit=2
    )
    req.pascal_support = of_request(req)
    return req


def travelled(req):
    """Its state as the target reads it."""
    return read_snapshot(export_state(req, 3.5), KV, LONGEST)


def altered(**changes):
    """The state of a request with other fields."""
    fields = msgspec.msgpack.decode(export_state(request(), 3.5))
    return msgspec.msgpack.encode({**fields, **changes})


def test_everything_listed_arrives():
    req = request()
    state = travelled(req)
    new = import_state(SCHEDULER, state)
    for name in (*GIVEN, *PLAIN):
        assert getattr(new, name) == getattr(req, name), name
    for name in TIMES:
        assert getattr(new.time_stats, name) == getattr(req.time_stats, name), name
    for name in ("origin_input_ids", "output_ids", "surr_and_decode_ids", "cur_decode_ids_len"):
        assert getattr(new, name) == getattr(req, name), name
    ours = {k: v for k, v in req.sampling_params.custom_params.items() if k != "__req__"}
    assert {k: v for k, v in new.sampling_params.custom_params.items() if k != "__req__"} == ours
    assert new.sampling_params.custom_params["__req__"].rid == "r"
    for name in ("max_new_tokens", "top_k", "stop_strs", "stop_token_ids", "stop_str_max_len"):
        assert getattr(new.sampling_params, name) == getattr(req.sampling_params, name), name
    assert new.logprob.top_logprobs_num == 1
    for name in OUTPUT_LOGPROBS:
        made, there = getattr(req.logprob, name), getattr(new.logprob, name)
        assert len(there) == len(made), name
        assert repr(there[2:]) == repr(made[2:]), name
    assert new.pascal_timeline == req.pascal_timeline
    new.pascal_state = RequestState(seq=9, pacer=Pacer(0.1), handle=new)
    restore_state(new, state)
    assert state.blocked_since == 3.5
    was = req.pascal_state
    for name in ("pacer", "phase", "phase_tokens", "total_tokens", "credit"):
        assert getattr(new.pascal_state, name) == getattr(was, name), name
    assert new.pascal_state.seq == 9, "its place in line is that of its arrival here"


def test_times_of_another_hosts_clock_are_brought_onto_this_ones(monkeypatch):
    req = request()
    monkeypatch.setattr(clock, "now", lambda: 4.0)
    state = travelled(req)
    assert on_this_clock(state, 1e9) is state, "one clock: nothing is changed, not by a digit"
    monkeypatch.setattr(clock, "name", lambda: "another")
    state = on_this_clock(state, 1004.0)
    new = import_state(SCHEDULER, state)
    new.pascal_state = RequestState(seq=9, pacer=Pacer(0.1), handle=new)
    restore_state(new, state)
    assert state.blocked_since == 1003.5
    assert new.time_stats.forward_entry_time == 1012.5
    for name in TIMES:
        was = getattr(req.time_stats, name)
        is_set = name.endswith("_time") and was
        assert getattr(new.time_stats, name) == (was + 1000 if is_set else was), name
    before, then = req.pascal_timeline, new.pascal_timeline
    assert (then.arrival, then.reasoning_end, then.finished) == (1001.0, 1002.0, None)
    assert [(b.start, b.end) for b in then.breaks] == [(1002.6, 1003.5), (1003.5, None)]
    assert (then.ttfo, then.ttft) == (before.ttfo, before.ttft)
    old, pacer = req.pascal_state.pacer, new.pascal_state.pacer
    assert pacer.slack(1004.0) == pytest.approx(old.slack(4.0))
    assert pacer.qoe == pytest.approx(old.qoe)
    fresh, late = Pacer(0.1), Pacer(0.1)
    late.shift(1000.0)
    assert fresh == late


def test_processes_of_one_host_have_one_clock():
    code = "from pascal_sglang import clock; print(clock.name())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == clock.name() != ""


def test_log_probabilities_of_the_prompt_travel_until_they_are_sent():
    """Afterwards only that they are there: SGLang collects them anew where they are not."""
    req = request()
    sent = import_state(SCHEDULER, travelled(req))
    assert sent.logprob.input_token_logprobs_val == sent.logprob.input_top_logprobs_val == []
    req.input_logprob_sent = False
    unsent = import_state(SCHEDULER, travelled(req))
    for name in PROMPT_LOGPROBS:
        assert repr(getattr(unsent.logprob, name)) == repr(getattr(req.logprob, name)), name
    silent = request()
    silent.return_logprob = False
    assert travelled(silent).logprobs == {}


def test_a_second_prefill_does_not_collect_log_probabilities_again(monkeypatch):
    """SGLang asserts that there are as many as it wants of the prompt."""
    monkeypatch.setattr(Req, "is_prefill_only", False)
    req = request()
    req.logprob_start_len = len(PROMPT)
    new = import_state(SCHEDULER, travelled(req))
    output = types.SimpleNamespace(
        input_token_logprobs=(-0.5,) * 3, input_top_logprobs_val=[[]], input_top_logprobs_idx=[[]]
    )
    processor = SchedulerLogprobResultProcessor(model_config=None)
    processor.add_input_logprob_return_values(0, new, output, 0, 3, last_prefill_chunk=True)
    assert new.logprob.input_token_logprobs_val == []


def test_a_state_that_no_message_takes_is_an_error():
    req = request()
    req.decoded_text = "x" * MAX_STATE_BYTES
    with pytest.raises(ValueError, match="bytes, of at most"):
        export_state(req, 0.0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": VERSION - 1}, "does not read"),
        ({"version": VERSION + 1}, "does not read"),
        ({"more": 1}, "does not read"),
        ({"policy": {"phase": "answering", "phase_tokens": 1, "total_tokens": 1}}, "does not read"),
        ({"prompt_ids": []}, "does not read"),
        ({"output_ids": []}, "different lengths"),
        ({"output_ids": ["1", 2, 3]}, "does not read"),
        ({"output_ids": [1.0, 2, 3]}, "does not read"),
        ({"output_ids": [2**63, 2, 3]}, "does not read"),
        ({"output_ids": [1]}, "different lengths"),
        ({"plain": {}}, "other plain fields"),
        ({"given": {**dict.fromkeys(GIVEN), "lora": 1}}, "other given fields"),
        ({"logprobs": {"input": 1}}, "other logprobs fields"),
        ({"sampling": ["much"]}, "does not read"),
        ({"timeline": {"arrival": 1, "bogus": 2}}, "does not read"),
        ({"policy": {"phase": "sleeping"}}, "does not read"),
        ({"policy": {}}, "does not read"),
    ],
)
def test_a_state_that_is_not_ours_is_refused_by_name(change, why):
    with pytest.raises(BadSnapshot, match=why):
        read_snapshot(altered(**change), KV, LONGEST)


@pytest.mark.parametrize("name", RequestSnapshot.__struct_fields__)
def test_a_state_without_a_field_is_refused(name):
    fields = msgspec.msgpack.decode(altered())
    del fields[name]
    with pytest.raises(BadSnapshot, match="does not read"):
        read_snapshot(msgspec.msgpack.encode(fields), KV, LONGEST)


def test_bytes_that_are_no_state_are_refused():
    whole = altered()
    for state in (b"", b"\x91" * 100_000, whole[:-1], whole + b"\x01"):
        with pytest.raises(BadSnapshot, match="does not read"):
            read_snapshot(state, KV, LONGEST)


def test_a_request_longer_than_this_instance_serves_is_refused():
    with pytest.raises(BadSnapshot, match=r"^longer"):
        read_snapshot(altered(), KV, len(PROMPT) + 49)
    with pytest.raises(BadSnapshot, match=r"^state and KV of different lengths$"):
        read_snapshot(altered(), KV + 1, LONGEST)


def test_one_that_waits_travels_without_kv():
    """It may have begun, or not."""
    for output in ([], OUTPUT):
        snapshot = read_snapshot(altered(output_ids=list(output)), 0, LONGEST)
        assert list(import_state(SCHEDULER, snapshot).output_ids) == list(output)


def test_what_is_not_listed_stays():
    assert why_not_migratable(request()) is None
    for change, why in (
        ({"customized_info": {"a": []}}, "customized output"),
        ({"to_finish": object()}, "its end"),
        ({"session_id": "s"}, "a session"),
        ({"weight_version_events": [1]}, "a change of weights"),
        ({"lora_id": "l"}, "a LoRA adapter"),
    ):
        req = request()
        for name, value in change.items():
            setattr(req, name, value)
        req.pascal_support = of_request(req)
        assert why_not_migratable(req) == why


def test_a_value_that_has_no_form_is_an_error():
    req = request()
    req.logprob.output_token_logprobs_val = [None, None, object()]
    with pytest.raises(TypeError, match="type object is unsupported"):
        export_state(req, 0.0)
    req = request()
    req.sampling_params.sampling_seed = 2**70
    with pytest.raises(OverflowError):
        export_state(req, 0.0)
