"""Matplotlib panels as SVG that stands inside a page by itself: no reference leaves the panel."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
}
PANEL_INCHES = (4.4, 3.1)
_numbers = itertools.count()
styled = matplotlib.rc_context(STYLE)  # decorates whatever draws


@dataclass(frozen=True, slots=True)
class Look:
    """How an arm is drawn. `line`: matplotlib's line style."""

    colour: str
    line: str
    marker: str


# The arms that the plans here and the simulator name look alike on every page: stock is dashed, the
# bound without memory pressure dotted.
KNOWN = {
    "fcfs": Look("#7f7f7f", "--", "s"),
    "priority": Look("#8c564b", "--", "s"),
    "total-tokens": Look("#8c564b", "--", "s"),
    "rr": Look("#0072b2", "-", "o"),
    "rr-restart": Look("#56b4e9", "-", "o"),
    "paper": Look("#cc79a7", "-", "o"),
    "pascal": Look("#d55e00", "-", "o"),
    "oracle": Look("#000000", ":", "D"),
}
OTHERS = ("#009e73", "#e69f00", "#9467bd", "#bcbd22", "#17becf", "#f781bf")


def looks(names: Sequence[str]) -> dict[str, Look]:
    """How each arm is drawn on a page, in every figure of it.

    Arms that differ after a comma (`rr, live` and `rr, simulated`) share a colour; those after the
    first are dotted.
    """
    found: dict[str, Look] = {}
    bases: dict[str, Look] = {}
    others = itertools.cycle(OTHERS)
    for name in names:
        base = name.partition(", ")[0]
        if base in bases:
            found[name] = Look(bases[base].colour, ":", "^")
        else:
            found[name] = bases[base] = KNOWN.get(base) or Look(next(others), "-", "o")
    return found


def panel(size: tuple[float, float] = PANEL_INCHES) -> tuple[Figure, Axes]:
    """One set of axes; a page sets them side by side as its width allows."""
    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained")
    return figure, figure.add_subplot()


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
