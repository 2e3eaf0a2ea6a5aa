"""A burst as its picture shows it: what the client saw, in cells of half a second."""

import asyncio
import io
import json

import pytest
from aiohttp import web
from rich.console import Console

from evals import burst
from evals.load.record import Record


def record(token_s, reasoning_tokens, *, sent_s=0.0, finished=True, error=None):
    return Record(
        arrival_s=sent_s,
        sent_s=sent_s,
        token_s=list(token_s),
        reasoning_tokens=reasoning_tokens,
        finished=finished,
        error=error,
    )


def drawn(record, until_s):
    return "".join(burst.LOOK.get(kind, (" ", ""))[0] for kind in burst.cells(record, until_s))


def test_a_request_is_queued_thinks_pauses_and_answers():
    # Sent in the first cell, first token in the third, a gap in the fifth and sixth.
    seen = record([1.1, 1.6, 3.1, 3.6, 4.2], reasoning_tokens=3)
    assert drawn(seen, 6.0) == "..tt--tAA   "


def test_nothing_is_drawn_before_it_was_sent():
    assert drawn(record([2.1], 0, sent_s=1.2), 3.0) == "  ..A "


def test_a_request_that_still_runs_is_paused_up_to_now():
    seen = record([0.1], reasoning_tokens=1, finished=False)
    assert drawn(seen, 2.0) == "t---"


def test_a_request_that_never_began_is_queued_up_to_now():
    assert drawn(record([], 0, finished=False), 1.5) == "..."


def test_an_error_ends_the_line_and_is_told():
    seen = record([0.1], reasoning_tokens=1, finished=False, error="HTTP 500: no")
    assert str(burst.row(3, seen, 2.0)) == "  3 t    HTTP 500: no"


def test_a_request_that_was_not_sent_yet_has_an_empty_line():
    assert drawn(Record(arrival_s=1.0), 1.0) == "  "


@pytest.mark.parametrize(
    ("until_s", "cell_s"), [(0.0, 0.5), (38.0, 0.5), (38.1, 1.0), (160.0, 4.0)]
)
def test_a_long_run_has_longer_letters(until_s, cell_s):
    assert burst.cell_length(until_s, 80) == cell_s


def test_the_same_seed_is_the_same_burst_for_every_server():
    assert burst.burst(12, 1) == burst.burst(12, 1)
    assert burst.burst(12, 1) != burst.burst(12, 2)
    assert [item.arrival_s for item in burst.burst(4, 0)] == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("text", "name", "url"),
    [
        ("fcfs=http://localhost:1", "fcfs", "http://localhost:1"),
        ("http://localhost:1/v1", "http://localhost:1/v1", "http://localhost:1"),
        ("http://localhost:1/?a=b", "http://localhost:1/?a=b", "http://localhost:1/?a=b"),
    ],
)
def test_a_server_may_have_a_name(text, name, url):
    assert burst.arm(text) == burst.Arm(name, url)


def test_no_server_is_one_line_and_exit_code_2(capsys):
    assert burst.main(["http://127.0.0.1:9", "--ready-check-timeout-sec", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("evals.burst: error: no server")


def test_a_refusal_is_shown_and_exit_code_1():
    """By a server that refuses every request but the first, which measures its pace."""

    async def ask():
        asked = []

        async def generate(request):
            asked.append(await request.json())
            if len(asked) > 1:
                return web.Response(status=503, text="no room")
            events = [
                {"completion_tokens": n, "reasoning_tokens": 1, "finish_reason": reason}
                for n, reason in ((1, None), (2, None), (3, {"type": "length"}))
            ]
            text = "".join(f"data: {json.dumps({'meta_info': each})}\n\n" for each in events)
            return web.Response(text=text + "data: [DONE]\n\n", content_type="text/event-stream")

        app = web.Application()
        app.router.add_get("/health", lambda _: web.Response())
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        console = Console(width=100, file=(out := io.StringIO()))
        options = burst.parse([f"one=http://127.0.0.1:{port}", "--requests", "2"])
        try:
            code = await asyncio.to_thread(burst.run, options, console)
        finally:
            await runner.cleanup()
        return code, out.getvalue(), asked

    code, said, asked = asyncio.run(ask())
    assert code == burst.EXIT_FAILED
    assert said.count("HTTP 503: no room") == 2
    assert "0 of 2 answers" in said
    assert "pascal" in asked[1]["sampling_params"]["custom_params"]
