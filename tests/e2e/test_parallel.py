"""Two instances, and two tensor-parallel ranks, on two cores."""

import json
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import sglang as sgl

from tests.doors import check
from tests.harness import PASCAL, TINY_FLAGS, Server
from tests.requests import generate

OPERATOR = "operator"
PROMPTS = [f"Item {i}:" + " and" * (i % 9) for i in range(12)]


def ids(server):
    bodies = [generate(p, think=6, total=30, rid=uuid.uuid4().hex) for p in PROMPTS]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda b: server.post("/generate", b), bodies))
    for body in bodies:
        seen = server.recent(body["rid"])
        assert (seen["reasoning_tokens"], seen["answer_tokens"]) == (7, 23)
        assert 0 < seen["ttft_s"] < seen["ttfo_s"] < 60
    return [r["output_ids"] for r in replies]


def answered(server):
    return [i["ended"].get("answered", 0) for i in server.instances()]


def wait_until(holds, what):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def rest(server):
    """Wait until no instance has a request, and each has told the controller so, which it may do
    right after the first status that says it, but before the second."""
    for _ in range(2):
        wait_until(lambda: not any(i["requests"] for i in server.instances()), "it does not rest")


@pytest.fixture(scope="module")
def two_instances(tiny_model):
    """From a shell, as a user starts it: its five processes import SGLang one by one, which is most
    of what this fixture costs. Other servers of ours are forks."""
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, "--dp-size", "2"]
    with Server(PASCAL, [*flags, "--admin-api-key", OPERATOR]) as server:
        server.headers = {"Authorization": f"Bearer {OPERATOR}"}
        yield server


def test_two_instances(pascal_server, two_instances):
    assert ids(two_instances) == ids(pascal_server)
    instances = two_instances.instances()
    assert [i["dp_rank"] for i in instances] == [0, 1]
    assert min(answered(two_instances)) > 0, "both got some"


def test_a_wish_for_an_instance_is_obeyed(two_instances):
    before = answered(two_instances)
    for rank, times in ((0, 2), (1, 5)):
        for _ in range(times):
            two_instances.post("/generate", generate("Here", 3, 8, routed_dp_rank=rank))
    after = answered(two_instances)
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 5]


def test_a_long_shared_beginning_stays_together(two_instances):
    """One after the other, so that memory is as free everywhere: the prefix decides."""
    before = answered(two_instances)
    for turn in range(6):
        rest(two_instances)
        two_instances.post("/generate", generate("once upon a time " * 60 + str(turn), 3, 8))
    gained = [b - a for a, b in zip(before, answered(two_instances), strict=True)]
    assert sorted(gained) == [0, 6]


def test_the_controller_sleeps_while_nothing_happens(two_instances):
    controllers = [
        p for p in two_instances.tree() if "data_parallel_controller" in " ".join(p.cmdline())
    ]
    assert len(controllers) == 1
    before, began = controllers[0].cpu_times(), time.monotonic()
    time.sleep(4)
    after, took = controllers[0].cpu_times(), time.monotonic() - began
    used = after.user + after.system - before.user - before.system
    assert used < 0.25 * took, "stock keeps a core busy"


def test_every_way_in_is_known_and_no_wider_than_the_docs_say(two_instances):
    seen = check(two_instances)
    assert seen >= {"HTTP", "Control messages", "SGLang's messages", "Metrics"}
    assert "KV receive buffer" not in seen, "no request moves unless it is asked for"


def test_the_status_is_the_operators(two_instances):
    """As SGLang's routes for the operator; and nothing of it is on those for everybody."""
    for header in ({}, {"Authorization": "Bearer somebody"}):
        request = urllib.request.Request(f"{two_instances.base_url}/pascal/status", headers=header)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 401
    with urllib.request.urlopen(f"{two_instances.base_url}/server_info", timeout=30) as reply:
        states = json.load(reply)["internal_states"]
    assert len(states) == 2
    assert [state for state in states if "pascal" in state] == []
    assert len(two_instances.instances()) == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/pascal/"),
        ("GET", "/pascal/status"),
        ("GET", "/pascal/config"),
        ("PUT", "/pascal/config"),
        ("POST", "/pascal/drain"),
        ("POST", "/pascal/undrain"),
    ],
)
@pytest.mark.parametrize("key", [None, "", "Bearer", f"Bearer {OPERATOR}x", f"Basic {OPERATOR}"])
def test_without_the_operators_key_nothing_is_said_and_nothing_changes(
    two_instances, method, path, key
):
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": key})
    data = None if method == "GET" else b'{"quantum_tokens": 41, "dp_rank": 1}'
    url = f"{two_instances.base_url}{path}"
    request = urllib.request.Request(url, data, headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 401
    assert len(refused.value.read()) < 100


def test_the_configuration_is_the_operators_and_every_instance_changes(two_instances):
    change = {"quantum_tokens": 40, "fairness": "api-key"}
    for header in ({}, {"Authorization": "Bearer somebody"}):
        for method, data in (("GET", None), ("PUT", json.dumps(change).encode())):
            url = f"{two_instances.base_url}/pascal/config"
            request = urllib.request.Request(url, data, header, method=method)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=30)
            assert refused.value.code == 401
    before = two_instances.get("/pascal/config")["config"]
    assert two_instances.put("/pascal/config", change)["config"] == {**before, **change}
    for instance in two_instances.instances():
        assert instance["config"].items() >= change.items()
    two_instances.put("/pascal/config", {"quantum_tokens": 500, "fairness": "off"})
    assert two_instances.get("/pascal/config")["config"] == before


def asked(server, path, body, key=OPERATOR):
    """Status and answer of a route for the operator."""
    request = urllib.request.Request(
        f"{server.base_url}{path}",
        body,
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as refused:
        return refused.code, json.loads(refused.read() or b"null")


def test_without_moves_a_drain_keeps_new_requests_away_and_the_others_end_there(two_instances):
    body = b'{"dp_rank": 1}'
    assert asked(two_instances, "/pascal/drain", body, key="somebody")[0] == 401
    assert asked(two_instances, "/pascal/drain", b"no JSON")[0] == 400
    here = generate("Here", 3, 7000, routed_dp_rank=1, rid=uuid.uuid4().hex)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(two_instances.post, "/generate", here)
        while here["rid"] not in {r["rid"] for r in two_instances.instances()[1]["requests"]}:
            assert not whole.done()
        code, progress = asked(two_instances, "/pascal/drain", body)
        assert (code, progress["state"], progress["left"]) == (200, "draining", 1)
        assert progress["kept"] == {"--pascal-migration off": 1}
        before = answered(two_instances)
        ids(two_instances)
        assert answered(two_instances)[0] - before[0] == len(PROMPTS)
        left = asked(two_instances, "/pascal/drain", body)[1]["left"]
        asked(two_instances, "/abort_request", json.dumps({"rid": here["rid"]}).encode())
        reason = whole.result()["meta_info"]["finish_reason"]["type"]
        assert left or reason == "length", "nothing else ends it"
    assert two_instances.recent(here["rid"])["dp_rank"] == 1
    wait_until(
        lambda: asked(two_instances, "/pascal/drain", body)[1]["state"] == "drained",
        "the last one has ended",
    )
    assert asked(two_instances, "/pascal/drain", b'{"dp_rank": 0}')[0] == 409
    assert asked(two_instances, "/pascal/undrain", body)[1]["state"] == "serving"
    two_instances.post("/generate", generate("Back", 3, 8, routed_dp_rank=1))


@pytest.fixture(scope="module")
def balanced_by_sglang(tiny_model):
    """Two instances of two ranks; requests that do not say whether they think do."""
    flags = ["--dp-size", "2", "--tp-size", "2", "--load-balance-method", "round_robin"]
    model = ["--model-path", str(tiny_model), *TINY_FLAGS]
    with Server(PASCAL, [*model, *flags, "--pascal-assume-reasoning"], warm=True) as server:
        yield server


def test_sglangs_own_balancing_on_request(balanced_by_sglang):
    server = balanced_by_sglang
    assert "placement=sglang" in server.output
    before = answered(server)
    for turn in range(6):
        server.post("/generate", generate("once upon a time " * 60 + str(turn), 3, 8))
    assert [b - a for a, b in zip(before, answered(server), strict=True)] == [3, 3]


def test_under_sglangs_balancing_nothing_is_drained(balanced_by_sglang):
    code, told = asked(balanced_by_sglang, "/pascal/drain", b'{"dp_rank": 1}')
    assert (code, "balancing" in told["message"]) == (409, True)


def test_two_tensor_parallel_ranks(pascal_server, balanced_by_sglang):
    assert ids(balanced_by_sglang) == ids(pascal_server)
    assert len(balanced_by_sglang.instances()) == 2, "whatever their ranks"


def test_tensor_parallel_ranks_change_in_the_same_pass(pascal_server, balanced_by_sglang):
    """Ranks that go by different numbers do not go on for long."""
    expected = ids(pascal_server)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(ids, balanced_by_sglang)
        changes = 0
        while not found.done() or changes < 4:
            fairness = "user" if changes % 2 else "off"
            change = {"quantum_tokens": 5 + changes % 3, "fairness": fairness}
            balanced_by_sglang.put("/pascal/config", change)
            changes += 1
        assert found.result() == expected
    for instance in balanced_by_sglang.instances():
        assert instance["config"].items() >= change.items()
        assert instance["policy_errors"] == 0
    balanced_by_sglang.put("/pascal/config", {"quantum_tokens": 500, "fairness": "off"})


def test_ranks_open_no_more_ways_in(balanced_by_sglang):
    assert check(balanced_by_sglang) >= {"Ranks of an instance", "Broadcasts between ranks"}


def test_who_does_not_say_thinks(balanced_by_sglang):
    said_no = generate("Once", think=None, total=6, rid=uuid.uuid4().hex)
    balanced_by_sglang.post("/generate", {**said_no, "require_reasoning": False})
    assert balanced_by_sglang.recent(said_no["rid"])["answer_tokens"] == 6

    silent = generate("Once", think=None, total=6, rid=uuid.uuid4().hex)
    balanced_by_sglang.post("/generate", silent)
    assert balanced_by_sglang.recent(silent["rid"])["reasoning_tokens"] == 6


@sgl.function
def one_call(s, question):
    s += question + sgl.gen("answer", max_tokens=10, temperature=0)


def test_calls_of_a_frontend_program_think(balanced_by_sglang):
    before = {r["rid"] for i in balanced_by_sglang.instances() for r in i["recent"]}
    state = one_call.run("Well?", backend=sgl.RuntimeEndpoint(balanced_by_sglang.base_url))
    assert state["answer"]
    recent = [r for i in balanced_by_sglang.instances() for r in i["recent"]]
    (call,) = (r for r in recent if r["rid"] not in before)
    assert call["reasoning_tokens"] == 10
