"""A load of requests that want log probabilities, and what came back of it."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.requests import generate

KEYS = (
    "input_token_logprobs",
    "input_top_logprobs",
    "input_token_ids_logprobs",
    "output_token_logprobs",
    "output_top_logprobs",
    "output_token_ids_logprobs",
)


def bodies(count):
    """Of each four: the answer's, those of some token ids, and the prompt's of two, of which one is
    streamed; the requests that are not streamed tell nothing before their 50th token."""
    kinds = (
        {},
        {"token_ids_logprob": [5, 6]},
        {"logprob_start_len": 0},
        {"logprob_start_len": 2, "token_ids_logprob": [7]},
    )
    return [
        generate(
            f"the odds of {i} " * (1 + i % 5),
            think=3 + i % 17,
            total=60 + 7 * (i % 13),
            rid=f"odds-{i}-{uuid.uuid4().hex}",
            return_logprob=True,
            top_logprobs_num=3,
            **kinds[i % 4],
        )
        for i in range(count)
    ]


def odds(server, count):
    """Per request its ids and all its log probabilities."""

    def one(job):
        i, body = job
        if i % 8 < 4:
            reply = server.post("/generate", body, timeout=300)
        else:
            reply = server.stream("/generate", body, timeout=300)[-1]
        meta = reply["meta_info"]
        return reply["output_ids"], {key: meta[key] for key in KEYS if key in meta}

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, enumerate(bodies(count))))


def assert_same(found, expected):
    """Ids alike and log probabilities as close as two orders of summation leave them."""
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, values), (_, wanted) in zip(found, expected, strict=True):
        assert values.keys() == wanted.keys()
        for key in values:
            assert _shape(values[key]) == _shape(wanted[key]), key
            assert _numbers(values[key]) == pytest.approx(_numbers(wanted[key]), abs=1e-3), key


def _flat(value):
    """Every entry `[log probability, id, text]` of a list of them, or of lists of them."""
    for each in value or ():
        if each is None or (each and not isinstance(each[0], list)):
            yield each
        else:
            yield from _flat(each)


def _shape(value):
    return [each and (each[0] is None, each[1]) for each in _flat(value)]


def _numbers(value):
    return [each[0] for each in _flat(value) if each and each[0] is not None]
