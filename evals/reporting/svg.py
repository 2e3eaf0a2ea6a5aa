"""Matplotlib figures as SVG that stands inside a page by itself: no reference leaves the figure."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: smaller, and a reader can search it
    "text.parse_math": False,  # a "$" in a name is a "$"
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8c564b",
)  # fmt: skip
PANEL_INCHES = (3.6, 2.6)
LEAST_WIDTH_INCHES = 7.2
ACROSS = 3
_numbers = itertools.count()
styled = matplotlib.rc_context(STYLE)  # decorates whatever draws


def panels(count: int, size: tuple[float, float] = PANEL_INCHES) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most `ACROSS` side by side, with room for a legend above."""
    across = min(count, ACROSS)
    down = -(-count // across)
    width = max(size[0] * across + 0.4, LEAST_WIDTH_INCHES)
    figure = Figure(figsize=(width, size[1] * down + 0.4))
    figure.set_layout_engine("constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(count)]


def colour(names: Sequence[str], name: str) -> str:
    """The same name has the same colour in every figure of a page."""
    return COLOURS[names.index(name) % len(COLOURS)]


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, above them."""
    entries = {
        label: handle
        for one in axes
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    if entries:
        # In inches: a handle with its padding, and a letter.
        width = 0.7 + 0.08 * max(map(len, entries))
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper left",
            ncols=max(1, min(len(entries), int(figure.get_figwidth() / width))),
        )


def inline(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element; `label` is read out in place of the picture."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format")))
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # An HTML parser knows the name spaces; without them no address is left in the page.
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    own = f"f{next(_numbers)}-"
    body = re.sub(r'\bid="', f'id="{own}', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{own}", body)
    safe = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return body.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)
