"""The chat client against a small server of our own that misbehaves on request."""

import pytest
from tqdm import tqdm

from evals.grading import chat
from evals.grading.chat import Endpoint, EndpointError, ask_all, first_model
from evals.grading.reply import Heard
from evals.load.attended import CUT
from tests.chat_server import ChatServer, Script


def ask(server, prompts, **options):
    endpoint = Endpoint(base_url=server.base_url, model="small", **options)
    with tqdm(total=len(prompts), disable=True) as bar:
        return ask_all(endpoint, prompts, bar)


def test_thinking_and_answer_are_told_apart_and_timed():
    with ChatServer(lambda _: Script()) as server:
        (heard,) = ask(server, ["why?"], max_tokens=9, seed=4, extra={"top_k": 1})
    record = heard.record
    assert (heard.thinking, heard.answer) == ("Let me see.", "I do not know.")
    assert (record.finished, record.error, heard.finish_reason) == (True, None, "stop")
    assert len(record.token_s) == 4
    assert record.reasoning_tokens == 2
    assert record.arrival_s == record.sent_s <= record.token_s[0]
    assert record.token_s == sorted(record.token_s)
    (body,) = server.bodies
    assert {k: v for k, v in body.items() if k != "stream_options"} == {
        "model": "small",
        "messages": [{"role": "user", "content": "why?"}],
        "temperature": 0.0,
        "seed": 4,
        "stream": True,
        "max_tokens": 9,
        "top_k": 1,
    }


def test_so_many_at_a_time_and_everything_once():
    prompts = [f"q{i}" for i in range(20)]
    # Nobody is answered before four have been open together.
    with ChatServer(lambda _: Script(together=4)) as server:
        heard = ask(server, prompts, concurrency=4)
    assert server.most == 4
    assert sorted(server.prompts) == sorted(prompts)
    assert all(each.record.finished for each in heard)


def test_each_failure_is_kept_with_its_request():
    scripts = {
        "busy": Script(status=503),
        "slow": Script(hangs=True),
        "cut": Script(ends=False),
        "ill": Script(error="out of memory"),
        "fine": Script(),
    }
    with ChatServer(scripts.__getitem__) as server:
        heard = ask(server, list(scripts), request_timeout_s=1.0)
    busy, slow, cut, ill, fine = heard
    assert busy.record.error == "HTTP 503: no"
    assert slow.record.error == chat.TIMEOUT
    assert (slow.thinking, slow.answer) == ("Let me see.", "")
    assert cut.record.error == "stream ended early"
    assert cut.answer == "I do not know."
    assert "out of memory" in ill.record.error
    assert [each.record.finished for each in heard] == [False] * 4 + [True]
    assert fine.record.error is None


def test_ctrl_c_keeps_what_came_back():
    scripts = {"a": Script(), "b": Script(ctrl_c=True, hangs=True), "c": Script()}
    with ChatServer(scripts.__getitem__) as server:
        heard = ask(server, list(scripts), concurrency=1)
    first, second, third = heard
    assert first.record.finished
    assert second.record.error == CUT
    assert third.record.sent_s is None
    assert [each.cut for each in heard] == [False, True, True]
    assert server.prompts == ["a", "b"]


def test_other_servers_other_names(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with ChatServer(lambda _: Script(thinking_key="reasoning")) as server:
        assert first_model(server.base_url) == "small"
        (heard,) = ask(server, ["q"])
    assert heard.thinking == "Let me see."
    assert server.keys == ["Bearer k"]


def test_an_endpoint_that_lists_no_models_or_is_not_there():
    with ChatServer(lambda _: Script()) as server:
        assert first_model(f"{server.base_url}/elsewhere") is None
    with pytest.raises(EndpointError, match=r"no server answers at http://127.0.0.1:9 \("):
        first_model("http://127.0.0.1:9")


def piece(**delta):
    return {"choices": [{"delta": delta, "finish_reason": None}]}


def test_pieces_count_as_the_tokens_they_hold():
    heard = Heard()
    for at, event in enumerate(
        [piece(reasoning_content="abc"), piece(content="def"), piece(content="ghijkl")], start=1
    ):
        heard.note(event, float(at))
    usage = {"completion_tokens": 12, "completion_tokens_details": {"reasoning_tokens": 3}}
    # Nine tokens of an answer in two pieces: the longer one had more of them.
    heard.note({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}, 4.0)
    heard.close()
    assert heard.record.token_s == [1.0] * 3 + [2.0] * 3 + [3.0] * 6
    assert heard.record.answer_s == [2.0] * 3 + [3.0] * 6
    assert (heard.completion_tokens, heard.reasoning_tokens) == (12, 3)


@pytest.mark.parametrize("usage", [None, {"completion_tokens": 4, "reasoning_tokens": 0}])
def test_a_piece_is_a_token_and_the_end_of_turn_is_none(usage):
    heard = Heard()
    for at, text in enumerate(["x", "longer", "y"]):
        heard.note(piece(content=text), float(at))
    heard.note({"choices": [], "usage": usage}, 3.0)
    heard.close()
    assert heard.record.token_s == [0.0, 1.0, 2.0]


def test_what_is_no_event_and_a_stream_without_an_end():
    heard = Heard()
    with pytest.raises(ValueError, match="not an event"):
        heard.note([1], 3.0)
    heard.close()
    assert heard.record.error == "stream ended early"


def test_an_aborted_request_is_no_answer():
    heard = Heard()
    heard.note(piece(content="x"), 0.0)
    heard.note({"choices": [{"delta": {}, "finish_reason": "abort"}]}, 1.0)
    heard.close()
    assert (heard.record.finished, heard.record.error) == (False, "abort")
