"""Single requests made into conversations.

The next prompt is all of the conversation so far, its answers included and its thinking left out
as chat templates do, followed by what is new. Conversations arrive open loop. Within one the loop
is closed: a turn is sent its pause after the one before it has ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from evals.load.items import Item


def converse(
    items: Sequence[Item],
    turns: Sequence[int],
    arrivals_s: Sequence[float],
    pauses_s: Sequence[float],
) -> list[Item]:
    """Take `turns` items each for the conversations that arrive at `arrivals_s`.

    pauses_s: one per item, seconds between the end of an answer and the next prompt; the first turn
    of a conversation does not use its own.
    """
    found: list[Item] = []
    remaining = zip(items, pauses_s, strict=True)
    for conversation, (count, earliest_s) in enumerate(zip(turns, arrivals_s, strict=True)):
        history = 0
        for turn in range(count):
            item, pause_s = next(remaining)
            pause_s = pause_s if turn else 0.0
            earliest_s += pause_s
            found.append(
                dataclasses.replace(
                    item,
                    arrival_s=earliest_s,
                    prompt_tokens=history + item.prompt_tokens,
                    conversation=conversation,
                    turn=turn,
                    pause_s=pause_s,
                    history_tokens=history,
                )
            )
            history += item.prompt_tokens + item.answer_tokens
    return found
