"""The reference platform serves each family as Hugging Face's implementation does."""

import pytest

from tests.engine.inproc import models
from tests.engine.inproc.bed import Request, run
from tests.engine.inproc.conftest import HYBRID_POOLS

POOLS = {"gpt_oss": "SWAKVPool", "deepseek_v3": "MLATokenToKVPool", "gemma2": "MHATokenToKVPool"}
TOKENS = 24
# The second is longer than a window and than a chunk of a prefill, the third has a prefix that the
# second left in the cache.
LONG = [97 + (5 * i) % 26 for i in range(75)]
PROMPTS = [[97 + i for i in range(5)], LONG, [*LONG[:60], *LONG[:30]]]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=HYBRID_POOLS) if f == "gpt_oss" else f for f in POOLS]
)
def test_tokens_are_those_of_hugging_face(family, tmp_path):
    model = models.build(family, tmp_path / family)
    asked = [
        Request(ids=ids, params={"max_new_tokens": TOKENS}, options={"return_logprob": True})
        for ids in PROMPTS
    ]
    flags = ["--max-total-tokens", "4096", "--chunked-prefill-size", "32", *models.FLAGS[family]]
    ours = run(model, asked, flags=flags)
    assert (ours.kinds["attention"], ours.kinds["pool"]) == ("ReferenceAttention", POOLS[family])
    for i, (tokens, logprobs) in enumerate(models.greedy(model, PROMPTS, TOKENS)):
        assert ours.outputs[i] == tokens
        off = max(abs(a - b) for a, b in zip(ours.logprobs[i], logprobs, strict=True))
        assert off < 1e-4
