"""Conversations: how they are made, and how the client holds them."""

import json
import time

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from evals.load.client import NOT_SENT, Target, open_loop
from evals.load.items import Item
from evals.load.lines import WorkloadError
from evals.load.prompt import Conversation, Reply, new_part, prompt_ids
from evals.load.turns import converse
from evals.workload import Recipe, build
from pascal_sglang.sim.loads.conversations import sizes
from tests.unit import loop_time


def test_the_next_prompt_is_all_that_was_said_and_more():
    items = [Item(0.0, prompt, 50, answer) for prompt, answer in ((10, 3), (20, 5), (7, 2), (9, 1))]
    made = converse(items, [3, 1], [1.0, 4.0], [9.0, 0.5, 0.25, 9.0])
    # 10; then 10 + 3 said and 20 new; then 33 + 5 said and 7 new. Thinking is not in it.
    assert [item.prompt_tokens for item in made] == [10, 33, 45, 9]
    assert [item.history_tokens for item in made] == [0, 13, 38, 0]
    assert [(item.conversation, item.turn) for item in made] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [item.pause_s for item in made] == [0.0, 0.5, 0.25, 0.0]
    # The earliest that a turn can come: no answer takes any time.
    assert [item.arrival_s for item in made] == [1.0, 1.5, 1.75, 4.0]


def test_turns_have_the_mean_and_the_total():
    counts = sizes(np.random.default_rng(0), 30_000, 3.0)
    assert sum(counts) == 30_000
    assert min(counts) == 1
    assert np.mean(counts) == pytest.approx(3.0, rel=0.03)


def test_conversations_keep_the_load_and_the_lengths():
    alone = build(Recipe(source="tiny-live", requests=6000, rate=5.0))
    talks = build(Recipe(source="tiny-live", requests=6000, rate=5.0, turns=4.0, pause_s=2.0))
    assert [i.thinking_tokens for i in talks] == [i.thinking_tokens for i in alone]
    assert [i.new_tokens for i in talks] == [i.prompt_tokens for i in alone]
    opened = [i.arrival_s for i in talks if i.turn == 0]
    assert opened == sorted(opened)
    assert len(talks) / opened[-1] == pytest.approx(5.0, rel=0.1)
    assert np.mean([i.pause_s for i in talks if i.turn]) == pytest.approx(2.0, rel=0.05)
    assert talks == build(
        Recipe(source="tiny-live", requests=6000, rate=5.0, turns=4.0, pause_s=2.0)
    )


def test_a_conversation_of_a_trace_comes_when_its_first_request_did(tmp_path):
    path = tmp_path / "azure.csv"
    rows = (f"2023-11-16 18:15:{second:02d},10,20" for second in range(50))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    items = build(Recipe(source="azure", path=path, turns=3.0))
    assert {i.arrival_s for i in items if i.turn == 0} == {
        float(place) for place, item in enumerate(items) if item.turn == 0
    }


def test_mooncake_has_its_own_prefixes(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5}\n')
    with pytest.raises(WorkloadError, match="no turns"):
        build(Recipe(source="mooncake", path=path, turns=2.0))


def test_new_parts():
    assert new_part(Item(0.0, 9, 1, 1), 3, 7) == prompt_ids(3, 9, 7)
    assert new_part(Item(0.0, 9, 1, 1, draw=(5, 2)), 3, 7) == prompt_ids(2, 9, 5)
    assert new_part(Item(0.0, 3, 1, 1, prompt="Why?"), 3, 7) == "Why?"
    assert new_part(Item(0.0, 2, 1, 1, prompt=(8, 9)), 3, 7) == [8, 9]
    later = Item(0.0, 20, 1, 1, conversation=0, turn=1, history_tokens=14)
    assert new_part(later, 3, 7) == prompt_ids(3, 6, 7)
    blocks = [
        new_part(Item(0.0, n, 1, 1, hash_ids=(1, 2), block_tokens=4), 0, 0) for n in (5, 8, 9, 11)
    ]
    assert [len(ids) for ids in blocks] == [5, 8, 9, 11]
    assert blocks[0] == blocks[1][:5]
    assert blocks[1] == blocks[2][:8] == blocks[3][:8]


def test_conversations_leave_thinking_out():
    ids = Conversation("</think>")
    assert ids.ask([1, 2]) == [1, 2]
    ids.answered(Reply(ids=[50, 51, 52, 60, 61]), reasoning_tokens=3)
    assert ids.ask([3]) == [1, 2, 60, 61, 3]
    text = Conversation("</think>")
    text.ask("Why?")
    text.answered(Reply(text="<think>hm</think>So."), reasoning_tokens=3)
    assert text.ask("And?") == "Why?So.\n\nAnd?"
    text.answered(Reply(text="No marker."), reasoning_tokens=0)
    assert text.ask("Oh?") == "Why?So.\n\nAnd?No marker.\n\nOh?"


def test_replies_come_whole_or_in_parts():
    whole, parts = Reply(), Reply()
    for reply, events in (
        (whole, [([7], "a"), ([7, 8, 9], "abc")]),
        (parts, [([7], "a"), ([8, 9], "bc")]),
    ):
        for count, (ids, text) in zip((1, 3), events, strict=True):
            reply.add({"output_ids": ids, "text": text, "meta_info": {"completion_tokens": count}})
    assert (whole.ids, whole.text) == (parts.ids, parts.text) == ([7, 8, 9], "abc")


# The client against a server that notes what it was asked ---------------------------------------


def replay(items, *, incremental=False, skip=None):
    """Output token `n` has id 1000 + n and text `n `; the marker is text `</think>`. skip: the time
    that the whole may take is over when this holds of the records."""
    asked, records = [], []

    async def generate(request):
        body = await request.json()
        asked.append((time.perf_counter(), body))
        thinking = body["sampling_params"]["custom_params"]["thinking_budget"]
        if thinking == 101:
            raise web.HTTPServiceUnavailable(text="busy")
        total = body["sampling_params"]["max_new_tokens"]
        texts = ["</think>" if n == thinking else f"{n} " for n in range(total)]
        reply = web.StreamResponse()
        await reply.prepare(request)
        for count in range(1, total + 1):
            first = count - 1 if incremental else 0
            event = {
                "text": "".join(texts[first:count]),
                "output_ids": [1000 + n for n in range(first, count)],
                "meta_info": {
                    "completion_tokens": count,
                    "reasoning_tokens": min(count, thinking + 1),
                    "finish_reason": {"type": "length"} if count == total else None,
                },
            }
            await reply.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        return reply

    async def go():
        app = web.Application()
        app.router.add_post("/generate", generate)
        async with TestServer(app, shutdown_timeout=0.1) as server:
            url = str(server.make_url("/"))
            target = Target(base_url=url, logit_processor="p", run_timeout_s=60.0)
            return await open_loop(items, target, 0, records)

    return loop_time.run(go(), records, skip).records, asked


def talk(*prompts, pause_s=0.05, thinking=2):
    """A conversation whose answers are two tokens."""
    size = {True: lambda p: 1, False: len}
    singles = [Item(0.0, size[isinstance(p, str)](p), thinking, 2, prompt=p) for p in prompts]
    return converse(singles, [len(prompts)], [0.0], [pause_s] * len(prompts))


@pytest.mark.parametrize("incremental", [False, True])
def test_a_turn_sends_what_was_said(incremental):
    # Of five output tokens the first three are thinking and the marker.
    _, asked = replay(talk((1, 2), (3,), (4, 5)), incremental=incremental)
    assert [body["input_ids"] for _, body in asked] == [
        [1, 2],
        [1, 2, 1003, 1004, 3],
        [1, 2, 1003, 1004, 3, 1003, 1004, 4, 5],
    ]
    assert all("text" not in body for _, body in asked)
    _, asked = replay(talk("Why?", "And?"), incremental=incremental)
    assert [body["text"] for _, body in asked] == ["Why?", "Why?3 4 \n\nAnd?"]
    assert all("input_ids" not in body for _, body in asked)


def test_prompts_are_as_long_as_their_items_say():
    items = build(Recipe(source="tiny-live", requests=12, rate=500.0, turns=3.0, pause_s=0.01))
    records, asked = replay(items)
    assert all(record.finished for record in records)
    lengths = sorted(len(body["input_ids"]) for _, body in asked)
    assert lengths == sorted(item.prompt_tokens for item in items)


def test_a_turn_waits_for_the_answer_and_its_pause():
    records, asked = replay(talk((1,), (2,), pause_s=0.2))
    first, second = records
    assert second.arrival_s == pytest.approx(first.token_s[-1] + 0.2)
    assert second.arrival_s <= second.sent_s <= second.token_s[0]
    assert asked[1][0] - asked[0][0] >= 0.2


def test_a_pause_holds_up_nobody_else():
    items = [*talk((1,), (2,), pause_s=300.0), Item(0.1, 3, 2, 2)]
    ended = replay(items, skip=lambda records: records[0].finished and records[2].finished)
    (first, second, single), asked = ended
    assert first.finished
    assert single.finished
    assert second.error == "timeout (run)"
    assert second.sent_s is None
    assert len(asked) == 2


def test_after_a_failure_the_conversation_ends():
    failing = talk((1,), (2,), (3,), thinking=101)
    records, asked = replay([*failing, Item(0.0, 3, 2, 2)])
    assert [record.error for record in records] == ["HTTP 503: busy", NOT_SENT, NOT_SENT, None]
    assert len(asked) == 2
