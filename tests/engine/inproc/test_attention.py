"""The reference platform's attention against SGLang's own in PyTorch, where that serves a model."""

from tests.engine.inproc.bed import Request, differing, run

FLAGS = ["--max-total-tokens", "4096", "--chunked-prefill-size", "32"]


def stock_attention(scheduler, reqs, passes):
    """Run on SGLang's backend from the first pass on."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    if passes == 1:
        runner = scheduler.tp_worker.model_runner
        runner.attn_backend = TorchNativeAttnBackend(runner)


def test_tokens_are_those_of_the_stock_backend(tiny_model):
    """With prefixes from the cache and prompts longer than a chunk."""
    shared = [97 + i % 26 for i in range(40)]
    asked = [
        Request(
            ids=[*shared[: 8 * (i % 6)], *(97 + (7 * i + j) % 26 for j in range(10))],
            options={"return_logprob": True},
        )
        for i in range(12)
    ]
    ours = run(tiny_model, asked, flags=FLAGS)
    stock = run(
        tiny_model,
        asked,
        flags=FLAGS,
        each_pass="tests.engine.inproc.test_attention:stock_attention",
    )
    assert ours.kinds["attention"] == "ReferenceAttention"
    assert stock.kinds["attention"] == "TorchNativeAttnBackend"
    assert differing(ours, stock) == []
    for mine, theirs in zip(ours.logprobs, stock.logprobs, strict=True):
        assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 1e-4
