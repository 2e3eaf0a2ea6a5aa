"""The clients users bring: the `openai` package and SGLang's own frontend language."""

import pytest
from openai import OpenAI

from tests.requests import generate, thinking


@pytest.fixture(scope="module")
def client(pascal_server):
    return OpenAI(base_url=f"{pascal_server.base_url}/v1", api_key="none", timeout=120)


def ask(client, think, **more):
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Tell me"}],
        temperature=0,
        max_tokens=40,
        extra_body={"ignore_eos": True, **thinking(think)},
        **more,
    )


def test_openai_gets_thinking_then_answer(client):
    message = ask(client, 10).choices[0].message
    assert message.reasoning_content
    assert message.content


def test_openai_stream_is_the_same_text_in_the_same_order(client):
    whole = ask(client, 10).choices[0].message
    thought, answer = "", ""
    for chunk in ask(client, 10, stream=True):
        delta = chunk.choices[0].delta
        if more := getattr(delta, "reasoning_content", None):
            assert answer == "", "thinking after the answer began"
            thought += more
        answer += delta.content or ""
    assert (thought, answer) == (whole.reasoning_content, whole.content)


def test_a_frontend_program_runs_and_its_calls_are_tracked(pascal_server):
    import sglang as sgl

    @sgl.function
    def story(s, topic):
        s += "Topic: " + topic + "\n"
        s += "Idea:" + sgl.gen("idea", max_tokens=12, temperature=0)
        s += "\nEnd:" + sgl.gen("end", max_tokens=8, temperature=0, stop="\n")

    before = pascal_server.instances()[0]["ended"].get("answered", 0)
    states = story.run_batch(
        [{"topic": t} for t in ("rain", "sun", "wind")],
        backend=sgl.RuntimeEndpoint(pascal_server.base_url),
        num_threads=3,
    )
    assert [len(s["idea"]) > 0 for s in states] == [True] * 3
    assert pascal_server.instances()[0]["ended"]["answered"] >= before + 6


def test_a_long_id_is_refused_on_every_route(pascal_server):
    import urllib.error

    from pascal_sglang.request_ids import MAX_ID
    from tests.requests import chat

    long = "x" * (MAX_ID + 1)
    one = generate("Once", think=None, total=3, rid=long)
    batch = {**one, "text": ["Once", "Twice"], "rid": ["short", long]}
    talk = chat("Once", think=None, total=3, rid=long)
    text = {"model": "tiny", "prompt": "Once", "max_tokens": 3, "rid": long}
    for path, body in (
        ("/generate", one),
        ("/generate", batch),
        ("/v1/chat/completions", talk),
        ("/v1/completions", text),
    ):
        for more in ({}, {"stream": True}):
            with pytest.raises(urllib.error.HTTPError) as caught:
                pascal_server.post(path, {**body, **more})
            assert (caught.value.code, path, more) == (400, path, more)
            assert f"at most {MAX_ID} are allowed" in caught.value.read().decode()
    pascal_server.post("/generate", {**one, "rid": long[:MAX_ID]})


def test_bad_requests_get_clear_errors_and_break_nothing(pascal_server):
    import json
    import urllib.error

    too_long = generate("x" * 9000, think=3, total=5)
    with pytest.raises(urllib.error.HTTPError) as caught:
        pascal_server.post("/generate", too_long)
    assert caught.value.code == 400
    assert "message" in json.loads(caught.value.read())["error"]
    pascal_server.post("/generate", generate("still there?", think=3, total=5))
