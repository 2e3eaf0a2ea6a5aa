"""Sends a few chats to a running server and prints the streams with the times a reader feels."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIError, AsyncOpenAI

EXIT_BAD_INPUT = 2
LAST_WORDS = 15
OURS = "pascal_sglang: "
QUESTIONS = (
    "What is the capital of France?",
    "Give me three tips for sleeping well.",
    "Why is the sky blue? Answer in two sentences.",
)


@dataclass
class Chat:
    """One streamed chat; times in seconds since it was sent."""

    question: str
    thinking: str = ""
    answer: str = ""
    times: dict[str, float] = field(default_factory=dict)


async def stream(client: AsyncOpenAI, model: str, question: str) -> Chat:
    chat = Chat(question)
    sent = time.perf_counter()
    chunks = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=120,
        temperature=0,
        stream=True,
    )
    async for chunk in chunks:
        if not chunk.choices:
            continue
        delta, now = chunk.choices[0].delta, time.perf_counter() - sent
        if thinking := getattr(delta, "reasoning_content", None):
            chat.times.setdefault("TTFT", now)
            chat.times["end of thinking"] = now
            chat.thinking += thinking
        if delta.content:
            chat.times.setdefault("TTFT", now)
            chat.times.setdefault("TTFO", now)
            chat.answer += delta.content
    chat.times["end"] = time.perf_counter() - sent
    return chat


def show(chat: Chat) -> None:
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    times = chat.times
    thought = times.get("end of thinking", 0.0) - times.get("TTFT", 0.0)
    print(f"\n> {chat.question}")
    print(f"{dim}<think> {chat.thinking.strip()} </think>{plain}")
    print(chat.answer.strip() or "(no answer)")
    print(
        f"  TTFT {times.get('TTFT', float('nan')):.2f} s, thought {thought:.2f} s, "
        f"TTFO {times.get('TTFO', float('nan')):.2f} s, done after {times['end']:.2f} s",
        flush=True,
    )


class ChatError(RuntimeError):
    """A server that cannot be chatted with; the message is one line."""


def get_json(url: str) -> dict[str, Any]:
    """What the server answers. Raises ChatError."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            told: dict[str, Any] = json.load(reply)
    except urllib.error.HTTPError as error:
        why = "; it wants --api-key or OPENAI_API_KEY" if error.code == 401 else ""
        raise ChatError(f"{url} answers HTTP {error.code}{why}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ChatError(f"{url}: {error}") from error
    return told


def wait_until_healthy(
    base_url: str, server_pid: int | None, timeout: float, log: Path | None
) -> None:
    """Poll `/health` until the server answers. Raises ChatError when it dies or is late.

    log: the server's messages, the last of which are shown when it dies.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server_pid is not None and not alive(server_pid):
            if log is not None:
                print("\n".join(messages(log)[-LAST_WORDS:]), file=sys.stderr)
            raise ChatError("the server ended before it was ready; its messages are above")
        try:
            with urllib.request.urlopen(f"{base_url}/health", timeout=5):
                return
        except (OSError, http.client.HTTPException):
            time.sleep(1)
    raise ChatError(f"the server was not ready within {timeout:.0f} s")


def messages(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()


def require_server(base_url: str, server_id: str) -> None:
    """The server that answers must be the one started with `server_id` in its environment.

    Raises: ChatError for another one, which has the port already.
    """
    try:
        same = get_json(f"{base_url}/pascal/status").get("server_id") == server_id
    except ChatError as error:
        raise ChatError(f"another server may have the port: {error}") from error
    if not same:
        raise ChatError(f"another server answers at {base_url}; choose a free port by --port")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def chat_all(base_url: str, model: str) -> None:
    key = os.environ.get("OPENAI_API_KEY") or "none"
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key=key, timeout=300) as client:
        show(await stream(client, model, QUESTIONS[0]))
        print("\nThe rest at once:")
        for chat in asyncio.as_completed([stream(client, model, q) for q in QUESTIONS[1:]]):
            show(await chat)


def show_status(base_url: str) -> None:
    print("\nWhat the server measured (GET /pascal/status):")
    for instance in get_json(f"{base_url}/pascal/status")["instances"]:
        for request in instance["recent"]:
            if request["ttfo_s"] is None or not request["reasoning_tokens"]:
                continue
            print(
                f"  {request['reasoning_tokens']:4d} thinking + {request['answer_tokens']:4d} "
                f"answering tokens: TTFT {request['ttft_s']:.2f} s, "
                f"reasoning {request['reasoning_time_s']:.2f} s, TTFO {request['ttfo_s']:.2f} s, "
                f"answer TPOT {(request['answer_tpot_s'] or 0) * 1000:.0f} ms"
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key", help="the server's key; OPENAI_API_KEY by default")
    parser.add_argument("--server-pid", type=int, help="give up as soon as this process is gone")
    parser.add_argument("--server-id", help="refuse a server that was not started with this id")
    parser.add_argument("--log", type=Path, help="where that server's messages go")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for the server")
    options = parser.parse_args(argv)
    if options.api_key:
        os.environ["OPENAI_API_KEY"] = options.api_key
    try:
        wait_until_healthy(options.base_url, options.server_pid, options.timeout, options.log)
        if options.server_id:
            require_server(options.base_url, options.server_id)
        if options.log is not None:
            print("\n".join(line for line in messages(options.log) if line.startswith(OURS)))
        models = get_json(f"{options.base_url}/v1/models")
        asyncio.run(chat_all(options.base_url, models["data"][0]["id"]))
        show_status(options.base_url)
    except (ChatError, APIError) as error:
        print(f"demo_chat: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        # The reader has gone; Python would say so again when it closes its output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


if __name__ == "__main__":
    sys.exit(main())
