"""Which request ids a client may choose.

Everything that speaks of a request carries its id: control messages between processes, which have a
limit, and `GET /pascal/status`. SGLang itself takes any text.
"""

from __future__ import annotations

from typing import Any

# Characters. Below `cluster.messages.MAX_TEXT`, since SGLang adds a number to the ids of a batch.
MAX_ID = 512


def problem_with(rid: Any) -> str | None:
    """What is wrong with the id of a request, or the list of ids of a batch; None if nothing is."""
    for each in rid if isinstance(rid, list) else (rid,):
        if not isinstance(each, str):
            continue  # SGLang makes an id where there is none, and refuses what is no text.
        if len(each) > MAX_ID:
            return f"rid has {len(each)} characters; at most {MAX_ID} are allowed."
        try:
            each.encode()
        except UnicodeEncodeError:
            return "rid is no valid Unicode text."
    return None
