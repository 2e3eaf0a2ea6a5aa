"""`GET /pascal/`: one page that shows the requests of this server live. It reads the status route
and changes nothing."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

PAGE_PATH = "/pascal/"


@functools.cache
def page() -> str:
    return Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


@functools.cache
def headers() -> dict[str, str]:
    """Those of the page: it runs its own script alone, and asks this server alone."""
    policy = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "script-src": _digest("script"),
        # Widths of bars are set by the script, which needs no more than the sheet.
        "style-src": _digest("style"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _digest(tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
