"""SGLang's priorities under memory pressure: the higher one ends first, and tokens stay."""

import random
import urllib.error
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.load import settled
from tests.engine.test_pressure import nothing_left
from tests.requests import generate

COUNT = 32
HIGH = frozenset(range(3, COUNT, 4))
SHORT = ["--max-total-tokens", "2500", "--enable-priority-scheduling"]


def bodies(priority_of):
    """Requests that think for most of their time, so that no answer's reader is in the way."""
    dice = random.Random(11)
    return [
        generate(
            f"Q{i} " + "x" * dice.randint(0, 40),
            think=dice.randint(70, 130),
            total=150,
            rid=f"{i}-{uuid.uuid4().hex}",
            **({} if priority_of is None else {"priority": priority_of(i)}),
        )
        for i in range(COUNT)
    ]


def run(server, priority_of=None):
    """Output ids; all are sent at once."""

    def one(body):
        return server.post("/generate", body, timeout=300)["output_ids"]

    with ThreadPoolExecutor(COUNT) as pool:
        return list(pool.map(one, bodies(priority_of)))


@pytest.fixture(scope="module")
def expected(stock_server):
    """Output ids with memory to spare and no priorities."""
    return run(stock_server)


def mean_place(order, chosen):
    places = [place for place, i in enumerate(order) if i in chosen]
    return sum(places) / len(places)


@pytest.mark.parametrize(
    ("flags", "high", "low"),
    [
        ([], 20, 0),
        (["--schedule-low-priority-values-first"], 0, 20),
        (["--priority-scheduling-preemption-threshold", "0"], 1, None),
        (["--disable-priority-preemption", "--default-priority-value", "20"], None, 0),
    ],
    ids=["high values first", "low values first", "none goes last", "no preemption, a default"],
)
def test_a_higher_priority_ends_first_and_tokens_stay(serve, expected, flags, high, low):
    settings = {"quantum_tokens": 20}
    with serve(settings, [*SHORT, *flags]) as server:
        ids = run(server, lambda i: high if i in HIGH else low)
        instance = settled(server)
    assert ids == expected
    nothing_left(instance)
    assert instance["policy_errors"] == 0
    assert any(name.startswith("pause:") for name in instance["decisions"]), "memory was not short"
    # As they ended in the engine, whenever their clients read that; SGLang had a request before.
    parts = [ended["rid"].partition("-") for ended in instance["recent"]]
    order = [int(number) for number, dash, _ in parts if dash]
    assert sorted(order) == list(range(COUNT))
    lower = set(range(COUNT)) - HIGH
    assert mean_place(order, HIGH) < mean_place(order, lower) - COUNT / 8


def test_where_priorities_are_off_a_request_with_one_may_be_refused(serve, expected):
    flags = ["--max-total-tokens", "2500", "--abort-on-priority-when-disabled"]
    with serve({"quantum_tokens": 20}, flags) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            run(server, lambda i: 20)
        ids = run(server)
        nothing_left(settled(server))
    assert refused.value.code == 503
    assert ids == expected


def test_an_order_of_sglangs_own_is_said_to_have_no_effect(serve, expected):
    """`lof` would take the longest first; one line says that it does not, and nothing is lost."""
    with serve({"quantum_tokens": 20}, [*SHORT, "--schedule-policy", "lof"]) as server:
        ids = run(server, lambda i: 20 if i in HIGH else 0)
        nothing_left(settled(server))
        said = server.output.count("--schedule-policy has no effect under policy pascal")
    assert ids == expected
    assert said == 1
