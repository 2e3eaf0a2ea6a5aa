"""Chats with a server or a gateway until its standard input ends, from several threads.

    python tests/chat_load.py BASE_URL THREADS

Every reply is one line of JSON: what it was asked, what came, and how it ended. Half of the
requests stream, half of them think. No request is tried again here.
"""

import json
import sys
import threading
from itertools import count

from openai import OpenAI

TOKENS = 24


def ask(client, number, stream, thinks):
    """text: thinking and answer. tokens: as the server counted them."""
    prompt = f"{number} is a number. Tell me about it"
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "extra_body": {
            "ignore_eos": True,
            "chat_template_kwargs": {"enable_thinking": thinks},
        },
    }
    told = {"number": number, "stream": stream, "thinks": thinks, "error": None}
    text, finish, usage = "", None, None
    try:
        if stream:
            options = {"include_usage": True}
            for chunk in client.chat.completions.create(
                stream=True, stream_options=options, **body
            ):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    delta = choice.delta
                    text += getattr(delta, "reasoning_content", None) or ""
                    text += delta.content or ""
                    finish = choice.finish_reason or finish
        else:
            reply = client.chat.completions.create(**body)
            (choice,), usage = reply.choices, reply.usage
            text = getattr(choice.message, "reasoning_content", None) or ""
            text += choice.message.content or ""
            finish = choice.finish_reason
    # Of the package, or of the library below it, where a stream breaks off.
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"[:300]
    return {**told, "text": text, "finish": finish, "tokens": usage and usage.completion_tokens}


def main():
    base_url, threads = sys.argv[1], int(sys.argv[2])
    numbers, ended, lock = count(), threading.Event(), threading.Lock()

    def chat():
        client = OpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=120, max_retries=0)
        while not ended.is_set():
            with lock:
                number = next(numbers)
            told = ask(client, number, stream=number % 2 == 0, thinks=number % 4 < 2)
            with lock:
                print(json.dumps(told), flush=True)

    running = [threading.Thread(target=chat) for _ in range(threads)]
    for thread in running:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in running:
        thread.join()


if __name__ == "__main__":
    main()
