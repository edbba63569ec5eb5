"""Measuring, breaking and writing labels; legends that fit their width."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from leaklib.figures.look import SMALL_PT

Legend = Literal["auto", "figure", "axes", "none"]


@functools.lru_cache(maxsize=4096)
def text_inches(text: str, points: float = SMALL_PT, weight: str = "normal") -> float:
    """Width of the widest line of `text` in inches, without drawing it."""
    font = FontProperties(family="DejaVu Sans", weight=weight)
    lines = [TextPath((0, 0), line, points, prop=font) for line in text.split("\n") if line.strip()]
    return max((float(line.get_extents().width) for line in lines), default=0.0) / 72


def wrap(label: object, most: int = 22) -> str:
    """Break a long label after spaces, underscores, hyphens, commas or slashes.

    >>> wrap("hubble_deep_field", 14).splitlines()
    ['hubble_deep_', 'field']
    """
    lines = [""]
    for piece in re.findall(r"[^\s_\-,/]+[\s_\-,/]*|[\s_\-,/]+", str(label)):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > most:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines)


def number_texts(values: np.ndarray) -> list[str]:
    """Short tick labels of one kind: all plain, or all powers of ten where one is too long.

    >>> number_texts(np.array([0.0, 0.01, 1.0])), number_texts(np.array([0.0, 1e-5, 1.0]))
    (['0', '0.01', '1'], ['0', '$10^{-5}$', '$10^{0}$'])
    """
    plain = all(value == 0 or 1e-3 <= abs(value) < 1e5 for value in values.tolist())
    return [_number(value, plain=plain) for value in values.tolist()]


def _number(value: float, *, plain: bool) -> str:
    if plain or value == 0:
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    factor = value / 10.0**exponent
    lead = "" if math.isclose(factor, 1.0) else rf"{factor:.3g}{{\cdot}}"
    return f"${lead}10^{{{exponent}}}$"


def draw_legend(ax: Axes, handles: Sequence[Any], title: str | None, where: Legend) -> None:
    """A legend above the figure or above the axes, in as many equal columns as fit."""
    figure = ax.get_figure(root=True)
    if where not in ("figure", "axes", "none"):
        raise ValueError(f"legend: expected 'auto', 'figure', 'axes' or 'none', got {where!r}")
    if figure is None or not handles or where == "none":
        return
    share = 1.0 if where == "figure" else ax.get_position().width * 1.1
    names = [str(handle.get_label()) for handle in handles]
    long = any(getattr(handle, "get_linestyle", lambda: "-")() != "None" for handle in handles)
    options: dict[str, Any] = {
        "handles": handles,
        "ncols": legend_columns(names, figure.get_figwidth() * share),
        "alignment": "left",
        "title": title.replace("_", " ") if title else None,
        "handlelength": 2.4 if long else 1.0,
    }
    if where == "figure":
        figure.legend(loc="outside upper left", **options)
    else:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), **options)


def legend_columns(names: Sequence[str], width: float) -> int:
    """Columns of a legend `width` inches wide: as few rows as fit, filled evenly."""
    most = max(1, int((width - 0.2) / (max(map(text_inches, names)) + 0.66)))
    rows = math.ceil(len(names) / most)
    return math.ceil(len(names) / rows)


def legend_inches(names: Sequence[str], width: float) -> float:
    """Height that a legend with a title takes at the top of a figure of this width."""
    return 0.3 + 0.21 * math.ceil(len(names) / legend_columns(names, width)) if names else 0.0
