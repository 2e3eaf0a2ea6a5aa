"""What a reply tells the response that it becomes, whatever its format."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from pascal_sglang.entrypoints import answer_eta
from pascal_sglang.streaming.held_chunks import Chunk
from pascal_sglang.streaming.pacing import answer_tokens

# Tokens that may count as an answer before SGLang sees that they open a thought.
MAY_OPEN = 2


def followed(stream: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """The reply to the request of this context: comments end where its answer begins, and a budget
    that it got here stands in its metadata."""
    exchange = answer_eta.exchange()
    if exchange is None:
        return stream
    # With tenants it is decided on in the stream.
    says_nothing = exchange.decided.is_set() and not (exchange.comments or any(exchange.budgets))
    return stream if says_nothing else _followed(stream, exchange)


async def _followed(
    stream: AsyncGenerator[Chunk, None], exchange: answer_eta.Exchange
) -> AsyncGenerator[Chunk, None]:
    try:
        async for chunk in stream:
            # Whole replies to a batch, or to a request with several answers, come as a list.
            if isinstance(chunk, list):
                yield [_seen(each, exchange, index) for index, each in enumerate(chunk)]
            else:
                yield _seen(chunk, exchange, chunk.get("index"))
    finally:
        await stream.aclose()


def _seen(chunk: Chunk, exchange: answer_eta.Exchange, index: object) -> Chunk:
    """A reply, or the next part of one, with the budget that its request got here."""
    meta = chunk.get("meta_info")
    if not isinstance(meta, dict):
        return chunk
    ended = meta.get("finish_reason") is not None
    exchange.answers = exchange.answers or ended or answer_tokens(chunk) > MAY_OPEN
    if (budget := exchange.budget_of(index)) is None:
        return chunk
    tokens, why = budget
    return {**chunk, "meta_info": {**meta, "pascal": {"thinking_budget": tokens, "why": why}}}
