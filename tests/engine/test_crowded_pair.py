"""Two instances with little memory that pause requests and move them by stop-and-copy.

Nothing of that shows, and every series that the dashboard asks for, with every label it uses, is on
`/metrics`. SGLang's operations on all requests reach those that are paused or move.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launch.monitoring.dashboard import OUT
from pascal_sglang.cluster.load_tracker import SILENT_S
from pascal_sglang.demo.tiny import build_tiny_model
from tests.engine.operations import (
    CROWD,
    TOTAL,
    body_of,
    call,
    chat_of,
    operate,
    pause_with_some_held,
    prompt_of,
    tokens_made,
)
from tests.engine.stage import Reader
from tests.engine.test_migration import FLOOD, at_rest, flood, nothing_left
from tests.promql import parsed, queries
from tests.requests import generate

CROWDED = {"live_migration": False, "chaos": 0.05, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64", "--dp-size", "2"]
# Prometheus adds these to what it scrapes.
TARGET = {"instance", "job"}


@pytest.fixture(scope="module")
def crowded(serve):
    with serve({**FLOOD, **CROWDED}, TIGHT, SGLANG_CPU_OMP_THREADS_BIND="0|1|0|1") as server:
        yield server


def test_a_flood_of_moves_and_pauses_is_invisible(crowded, reference):
    flood(crowded, 60, reference)


def placed(server, expected=None):
    """Requests placed so far, once the controller knows of none that runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        shown = server.get("/pascal/status")["controller"]
        count = sum(shown["placed"].values())
        if not shown["live_requests"] and expected in (None, count):
            return count
        time.sleep(0.2)
    raise AssertionError(f"expected {expected}: {shown}")


def test_health_probes_go_past_the_figures(crowded):
    """A busy instance drops them and says nothing, so the controller remembers nothing of them."""
    at_rest(crowded)
    before = placed(crowded)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(crowded.get, ["/health_generate"] * 4))
    crowded.post("/generate", generate("A user", None, 2))
    placed(crowded, before + 1)


def exported(text):
    """Names on `/metrics`, each with the labels of its samples."""
    labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_every_query_names_what_is_exported(crowded):
    """After a flood of those who pause and move, one request that does not move, and one that is
    not paused either."""
    crowded.post("/generate", generate("Stay", think=5, total=20, session_id="s"))
    beams = generate("Beams", think=None, total=20)
    beams["sampling_params"]["beam_width"] = 2
    crowded.post("/generate", beams)
    found = exported(crowded.get("/metrics"))
    names = {name for name in found if name.startswith("pascal:")}
    assert len(names) > 30
    for query in queries(json.loads(OUT.read_text())):
        selectors, grouped = parsed(query)
        for name, matched in selectors:
            if name.startswith("pascal:tool_"):
                continue  # With --pascal-tool-kv alone (`test_tool_calls`).
            assert name in found, f"{name} is not exported; {query}"
            assert matched - TARGET <= found[name], query
        known = set().union(*(found.get(name, grouped) for name, _ in selectors)) | TARGET
        assert grouped <= known, query


def asked(server, bodies):
    """The output ids of each, sent all at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return [r["output_ids"] for r in pool.map(lambda b: server.post("/generate", b), bodies)]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def whole(crowded):
    """What the crowd answers when nothing is done to it."""
    return asked(crowded, [body_of(i) for i in range(CROWD)])


GO_PAST_REQUESTS = {
    "/freeze_gc": {},
    "/configure_logging": {"log_requests": False},
    "/open_session": {"capacity_of_str_len": 1000},
}


def relabel_in_place(server):
    """Change the weights' name while nothing runs, moves or is brought back, and go on. Returns the
    tokens that each request had."""
    before = pause_with_some_held(server, resident=1)
    operate(server, "/update_weight_version", new_version="first", abort_all_requests=False)
    assert call(server, "/flush_cache")[0] == 400, "KV in use was flushed"
    made = tokens_made(before)
    after = server.instances()
    assert [i["pauses"] for i in after] == [i["pauses"] for i in before]
    assert all(count == made.get(i, count) for i, count in tokens_made(after).items())
    operate(server, "/continue_generation")
    deadline = time.monotonic() + 60
    while tokens_made(server.instances()) == made:
        assert time.monotonic() < deadline, "it did not go on"
    return made


def replace_weights(server, model):
    """By retraction, flush and update. Returns the tokens that each request had."""
    pause_with_some_held(server, host=1, begun=CROWD // 2)
    operate(server, "/pause_generation", mode="retract")
    instances = server.instances()
    made = tokens_made(instances)
    assert [i["paused"] for i in instances] == [0, 0]
    assert sum(i["waiting"] for i in instances) == len(made)
    operate(server, "/flush_cache")
    for kv in (i["kv_tokens"] for i in server.instances()):
        assert (kv["free"], kv["host"]) == (kv["capacity"], 0)
    update(server, model, "second")
    operate(server, "/continue_generation")
    return made


def update(server, model, version):
    said = operate(
        server, "/update_weights_from_disk", model_path=str(model), weight_version=version
    )
    assert json.loads(said)["success"]


def test_a_weight_update_reaches_everybody(crowded, whole, tiny_model, other_model):
    """Tokens before it are the old model's and tokens after it the new one's, whether a request
    ran, waited, was paused or moved."""
    readers = [Reader(crowded, body_of(i)) for i in range(CROWD)]
    for path, body in GO_PAST_REQUESTS.items():
        operate(crowded, path, **body)
    first, second = relabel_in_place(crowded), replace_weights(crowded, other_model)
    ends = [reader.end() for reader in readers]
    assert [how for _, how in ends] == [["length"]] * CROWD
    cut = {}
    for i, reader in enumerate(readers):
        ids, spans = ends[i][0], reader.meta["weight_versions"]
        edges = [0, *(span["end"] for span in spans)]
        assert [span["start"] for span in spans] == edges[:-1]
        assert edges[-1] == TOTAL
        starts = {span["version"]: span["start"] for span in spans}
        assert list(starts) == [v for v in ("default", "first", "second") if v in starts]
        if 0 < first.get(i, 0) < second.get(i, TOTAL):
            assert starts["first"] == first[i]
        if i in second:
            assert starts["second"] == second[i]
        cut[i] = starts.get("second", TOTAL)
        assert ids[: cut[i]] == whole[i][: cut[i]]
    begun = [i for i in range(CROWD) if 0 < cut[i] < TOTAL]
    assert len(begun) >= CROWD // 2
    new = asked(crowded, [body_of(i, ends[i][0][: cut[i]]) for i in begun])
    differ = [i for i, ids in zip(begun, new, strict=True) if ends[i][0][cut[i] :] != ids]
    assert differ == []
    assert any(ends[i][0] != whole[i] for i in begun), "both models say the same"
    # Without requests there is nothing to pause.
    update(crowded, tiny_model, "default")
    nothing_left(at_rest(crowded))


GENERATE, CHAT = "/generate", "/v1/chat/completions"
KINDS = [(path, stream) for path in (GENERATE, CHAT) for stream in (False, True)]


def test_aborted_requests_return_the_tokens_they_have(crowded, whole):
    """Those that run, are paused, wait to be prefilled again or move; streamed or not, on both
    interfaces, with true usage."""
    jobs = [
        (i, path, stream) for i, (path, stream) in zip(range(CROWD), cycle(KINDS), strict=False)
    ]

    def reply_to(job):
        i, path, stream = job
        body = chat_of(i) if path == CHAT else body_of(i)
        if not stream:
            return body["rid"], crowded.post(path, body)
        usage = {"stream_options": {"include_usage": True}} if path == CHAT else {}
        return body["rid"], crowded.stream(path, {**body, **usage})[-1]

    with ThreadPoolExecutor(CROWD) as pool:
        replies = [pool.submit(reply_to, job) for job in jobs]
        pause_with_some_held(crowded, resident=1, host=1, again=1, begun=CROWD // 2)
        operate(crowded, "/abort_request", abort_all=True)
        operate(crowded, "/continue_generation")
        replies = [reply.result() for reply in replies]
    nothing_left(at_rest(crowded))
    aborted = 0
    for (i, path, stream), (rid, reply) in zip(jobs, replies, strict=True):
        ended = crowded.recent(rid)
        made = ended["reasoning_tokens"] + ended["answer_tokens"]
        if ended["outcome"] != "aborted" or not made:
            continue  # It had ended before, or not begun.
        aborted += 1
        usage = reply["meta_info"] if path == GENERATE else reply["usage"]
        assert usage["completion_tokens"] == made, (i, path, stream)
        prompt = len(prompt_of(i)) if path == GENERATE else usage["total_tokens"] - made
        assert usage["prompt_tokens"] == prompt > 0
        if path == GENERATE:
            assert reply["output_ids"] == whole[i][:made]
            assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        elif not stream:
            assert reply["choices"][0]["finish_reason"] == "abort"
    assert aborted >= CROWD // 2


def test_instances_that_are_paused_for_long_are_not_silent(crowded):
    """They make no pass, and say that they live all the same."""
    operate(crowded, "/pause_generation", mode="in_place")
    try:
        until = time.monotonic() + SILENT_S + 2
        while time.monotonic() < until:
            assert crowded.get("/pascal/status")["controller"]["silent"] == []
            assert all("requests" in instance for instance in crowded.instances())
            time.sleep(0.5)
    finally:
        operate(crowded, "/continue_generation")
