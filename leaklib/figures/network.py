"""Pictures of networks: where a layer's equations leave something of its input open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from leaklib.figures.lettering import text_inches
from leaklib.figures.look import FAINT, INK, SMALL_PT, TEXT_PT, styled, width_in_inches
from leaklib.figures.network_plan import (
    DOT,
    EDGE,
    LINE,
    SKIP,
    TALLEST,
    TIMES,
    HasTable,
    Layer,
    Plan,
    box_sizes,
    make_plan,
    read_layers,
    read_tables,
    two_lines,
)

# Upper ends of the share of an input that is left open, and a colour for each: from white to dark
# red, darker in steps that a grey print keeps apart.
SHARES = (
    (0.0, "#FFFFFF", "0"),
    (0.05, "#FDE0C2", "< 5 %"),
    (0.2, "#FDB27A", "5–20 %"),
    (0.5, "#E5602F", "20–50 %"),
    (1.0, "#8E1B0E", "> 50 %"),
)
_TITLE = "share of the input left open:"


@styled
def network_diagram(
    networks: Mapping[str, pd.DataFrame | HasTable],
    *,
    notes: Mapping[str, str] | None = None,
    last: str = "logit",
    width: str | float = "page",
) -> Figure:
    """Networks as rows of boxes from the image to the output, one for the input of each layer.

    A box is as high as the picture is large and as wide as it has channels, both compressed; a
    vector is a column. Its colour says which share of its entries the layer's equations leave open,
    its number how many; white with 0 has full rank. The skip of a residual block is a line above.

    Args:
        networks: name -> table with the columns layer, kind, input ("12x17x17" or "3200"),
            unknowns and deficit (rank − unknowns <= 0), from the image on; or a report with such a
            `table()`.
        notes: name -> text behind the name, such as the network's index.
        last: what the last layer gives.
        width: 'column', 'page' or inches.

    Raises:
        ValueError: no network, a table without rows or columns, deficits that are none, notes on
            networks that are not there, or more layers than can be read at this width.
    """
    rows = {name: read_layers(name, table) for name, table in read_tables(networks).items()}
    notes = dict(notes or {})
    if unknown := sorted(set(notes) - set(rows)):
        raise ValueError(f"notes: expected names among {sorted(rows)}, got {unknown}")
    inches = width_in_inches(width)
    plan = make_plan(rows.values(), inches, last)
    scale = _scale(inches)
    figure, ax = _open(inches, EDGE + plan.height * len(rows) + (1.5 + scale[-1][1]) * LINE)
    for place, (name, row) in enumerate(rows.items()):
        top = EDGE + place * plan.height
        ax.text(EDGE, top + 0.75 * LINE, name, fontsize=TEXT_PT, fontweight="bold")
        if name in notes:
            left = EDGE + text_inches(name, TEXT_PT, "bold") + 0.2
            ax.text(left, top + 0.75 * LINE, notes[name], fontsize=SMALL_PT, color=FAINT)
        _draw_row(ax, row, plan, top)
    _draw_scale(ax, EDGE + plan.height * len(rows), scale)
    return figure


def _draw_row(ax: Axes, row: Sequence[Layer], plan: Plan, top: float) -> None:
    """Boxes along one middle line, arrows between them, the last layer's output at the end."""
    roof = top + plan.above
    middle, foot = roof + TALLEST / 2, roof + TALLEST
    places = [EDGE + (place + 0.5) * plan.pitch for place in range(len(row))]
    boxes = box_sizes(row, plan)
    out = places[-1] + plan.pitch / 2 + 2 * DOT
    # what follows a box: where its left edge is, and where a skip comes down on it
    follows = [
        (x - wide / 2, x - wide / 4, middle - high / 2)
        for x, (wide, high) in zip(places, boxes, strict=True)
    ]
    follows = [*follows[1:], (out - DOT, out, middle - DOT)]
    for layer, x, (wide, high), (edge, landing, height) in zip(
        row, places, boxes, follows, strict=True
    ):
        face, ink = _colours(layer.share)
        ax.add_patch(
            Rectangle((x - wide / 2, middle - high / 2), wide, high, fc=face, ec=INK, lw=1.0)
        )
        _write(ax, x, middle, layer.number, plan, colour=ink, va="center_baseline")
        for line, text in enumerate(reversed(layer.name)):
            _write(ax, x, roof - SKIP * plan.skips - (0.35 + 0.85 * line) * LINE, text, plan)
        size = [TIMES.join(map(str, layer.shape))]
        for line, text in enumerate(two_lines(layer.shape) if plan.size_lines == 2 else size):
            _write(ax, x, foot + 0.85 * (1 + line) * LINE, text, plan, colour=FAINT)
        ax.annotate(
            "", (edge, middle), (x + wide / 2, middle),
            arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.0, "shrinkA": 0, "shrinkB": 0,
                        "mutation_scale": 7},
        )  # fmt: skip
        if layer.skips:
            start, over = x + wide / 4, roof - SKIP / 2
            ax.plot(
                [start, start, landing, landing], [middle - high / 2, over, over, height],
                color=INK, lw=1.2,
            )  # fmt: skip
    ax.add_patch(Circle((out, middle), DOT, fc=INK, ec=INK))
    ax.text(out + 2 * DOT, middle, plan.last, fontsize=SMALL_PT, va="center_baseline")


def _scale(inches: float) -> list[tuple[float, int]]:
    """Left end and line of the scale's title and of each colour, as many to a line as fit."""
    places, x, line = [(EDGE, 0)], EDGE + text_inches(_TITLE) + 0.15, 0
    for _, _, text in SHARES:
        long = 0.28 + text_inches(text)
        if x + long > inches:
            x, line = EDGE, line + 1
        places.append((x, line))
        x += long + 0.14
    return places


def _draw_scale(ax: Axes, top: float, places: list[tuple[float, int]]) -> None:
    """The colours and what they mean."""
    base = [top + (0.9 + line) * LINE for _, line in places]
    ax.text(places[0][0], base[0], _TITLE, fontsize=SMALL_PT)
    for (x, _), y, (_, face, text) in zip(places[1:], base[1:], SHARES, strict=True):
        ax.add_patch(Rectangle((x, y - 0.12), 0.22, 0.14, fc=face, ec=INK, lw=0.8))
        ax.text(x + 0.28, y, text, fontsize=SMALL_PT)


def _write(
    ax: Axes, x: float, y: float, text: str, plan: Plan, *, colour: str = INK,
    va: str = "baseline",
) -> None:  # fmt: skip
    ax.text(x, y, text, fontsize=plan.points, color=colour, ha="center", va=va)


def _open(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose one axes measures inches from the upper left corner."""
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    return figure, ax


def _colours(share: float) -> tuple[str, str]:
    """Face and ink of a box."""
    face = next(colour for end, colour, _ in SHARES if share <= end)
    red, green, blue = to_rgb(face)
    return face, INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.4 else "#FFFFFF"
