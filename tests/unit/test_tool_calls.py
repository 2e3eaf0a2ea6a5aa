"""Which replies a scheduler takes for tool calls."""

from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_STR,
    FINISH_MATCHED_TOKEN,
)

from pascal_sglang.demo.tiny import END_OF_TURN_ID, tokenizer
from pascal_sglang.engine import tool_calls
from pascal_sglang.engine.tool_calls import ToolCalls
from pascal_sglang.policy.tool_waits import ToolWaits

TOKENIZER = tokenizer()
CALL = '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>'
STOP = FINISH_MATCHED_TOKEN(END_OF_TURN_ID)


@pytest.fixture
def calls(monkeypatch):
    def made(parser="qwen", text=TOKENIZER):
        serving = SimpleNamespace(tool_call_parser=parser)
        monkeypatch.setattr(tool_calls, "get_serving", lambda: serving)
        return ToolCalls(SimpleNamespace(tokenizer=text))

    return made


def reply(answer, *, thought="", tools="auto", reason=STOP, end=None, hints=None, **own):
    before, ids = TOKENIZER.encode(thought), TOKENIZER.encode(answer)
    return SimpleNamespace(
        output_ids=[*before, *ids],
        finished_len=end,
        finished_reason=reason,
        kv_hints=hints,
        sampling_params=SimpleNamespace(custom_params={"pascal": {"tools": tools, **own}}),
        pascal_timeline=SimpleNamespace(answer_tokens=len(ids)),
    )


def test_a_call_is_found_in_the_answer_and_nowhere_else(calls):
    wait_of = calls().wait_of
    assert wait_of(reply(f"I look. {CALL}")) == (True, None)
    assert wait_of(reply("I know.")) == (False, None)
    assert wait_of(reply("I know.", thought=CALL)) == (False, None)
    assert wait_of(reply(CALL, tools="")) == (False, None), "none were offered"
    assert wait_of(reply(f"Stop{CALL}", end=4)) == (False, None), "behind its end"


@pytest.mark.parametrize(
    ("reason", "waits"),
    [
        (STOP, True),
        (FINISH_MATCHED_STR("x"), True),
        (FINISH_LENGTH(7), False),
        (FINISH_ABORT("gone"), False),
        (None, False),
    ],
)
def test_only_a_reply_that_ends_by_itself_waits(calls, reason, waits):
    wait_of = calls().wait_of
    assert wait_of(reply(CALL, reason=reason))[0] == waits
    assert wait_of(reply("[]", tools="required", reason=reason))[0] == waits
    assert wait_of(reply("Well", tools="", reason=reason, tool_wait_s=5))[0] == waits


def test_a_required_call_needs_no_parser_and_one_that_is_not_does(calls):
    wait_of = calls(parser=None).wait_of
    assert wait_of(reply("[]", tools="required")) == (True, None)
    assert wait_of(reply(CALL)) == (False, None)
    assert calls(text=None).wait_of(reply(CALL)) == (False, None), "tokens are no text here"


def test_what_a_request_asks_for_goes_before_what_it_says(calls):
    wait_of = calls().wait_of
    assert wait_of(reply(CALL, tool_wait_s=0)) == (False, 0)
    assert wait_of(reply("Well", tool_wait_s=7)) == (True, 7)
    action = SimpleNamespace(
        action_type="pascal.tool_wait", action_version="1", payload={"seconds": 3}
    )
    assert wait_of(reply("Well", hints=SimpleNamespace(actions=[action]))) == (True, 3)


def test_a_parser_that_fails_finds_nothing(calls):
    class Failing:
        def has_tool_call(self, _):
            raise ValueError("no JSON")

    found = calls()
    found._detector = Failing()
    assert found.wait_of(reply(CALL)) == (False, None)


def rendered(template, messages, **more):
    text = TOKENIZER.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **more
    )
    return array("q", TOKENIZER.encode(text))


# As those that a model's template writes: what opens a reply, and what stands there later.
QWEN3_THINKING = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.reasoning_content -%}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' -}}
{%- endif -%}
{{- message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n<think>\n' -}}
"""


@pytest.mark.parametrize("thought", [None, "Hm."])
@pytest.mark.parametrize(
    ("template", "more"),
    [
        (None, {}),
        (None, {"enable_thinking": False}),
        (QWEN3_THINKING, {}),
    ],
)
def test_the_next_turn_is_found_as_templates_write_it(template, more, thought):
    """They leave out the thinking and what opened it, or write both."""
    waits = ToolWaits()
    asked = [{"role": "system", "content": "Go."}, {"role": "user", "content": "A"}]
    prompt = rendered(template, asked, **more)
    reply = TOKENIZER.encode(f"Hm.\n</think>\n\n{CALL}<|im_end|>")
    waits.replied(prompt + array("q", reply), len(prompt), None, 0.0)
    (made,) = waits
    said = {"role": "assistant", "content": CALL, "reasoning_content": thought}
    result = {"role": "tool", "content": "It is so."}
    for other in ("B", "BB", "AB", "A A"):
        question = {"role": "user", "content": other}
        for later in ([], [said, result]):
            ids = rendered(template, [asked[0], question, *later], **more)
            assert waits.arrived("other", ids, None, 1.0) is None
    assert waits.arrived("again", prompt, None, 1.0) is None
    ids = rendered(template, [*asked, said, result], **more)
    assert waits.arrived("next", ids, None, 1.0) is made
