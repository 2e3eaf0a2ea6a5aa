"""The API key that goes along with every request: `--api-key`, by default `OPENAI_API_KEY`.

It is kept in the environment, where SGLang's own benchmark and OpenAI's client look for it too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

ENV = "OPENAI_API_KEY"


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key", type=use, metavar="KEY", help=f"the server's key ({ENV} by default)"
    )


def use(key: str) -> str:
    """Send `key` from now on."""
    os.environ[ENV] = key
    return key


def use_key_of(command: Sequence[str]) -> None:
    """Send the key that a server so started asks for, if it does."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-key", nargs="?")
    if given := parser.parse_known_args(command)[0].api_key:
        use(given)


def key() -> str | None:
    return os.environ.get(ENV)


def headers() -> dict[str, str]:
    """What a request says for itself; nothing without a key."""
    return {"Authorization": f"Bearer {own}"} if (own := key()) else {}
