"""Two quantities that should agree, one point each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leaklib.figures.lettering import Legend
from leaklib.figures.look import FAINT, styled
from leaklib.figures.series import open_chart
from leaklib.figures.ticks import fix_scale

Numbers = Sequence[float] | np.ndarray | torch.Tensor


@styled
def identity_scatter(
    x: Numbers,
    y: Numbers,
    *,
    x_label: str,
    y_label: str,
    hue: Sequence[object] | None = None,
    hue_label: str = "",
    limits: tuple[float, float] | None = None,
    role: str = "plain",
    width: str | float = "column",
    legend: Legend = "auto",
    ax: Axes | None = None,
) -> Figure:
    """Two positive quantities on equal log axes, with the line on which they agree.

    Args:
        x: predicted values, `(points,)`, positive.
        y: observed values, `(points,)`, positive.
        x_label: axis label, with its unit.
        y_label: axis label, with its unit.
        hue: name of each point's series, `(points,)`.
        hue_label: title of the legend.
        limits: ends of both axes; by default those of all values with a margin.
        role: look when there is no hue.
        width: 'column', 'page' or inches; the figure is about as high as wide.
        legend: 'auto', 'figure', 'axes' or 'none'.
        ax: draw into these axes instead of a figure of its own.

    Raises:
        ValueError: lengths differ, or a value is not positive and finite.
    """
    across, up = _positive("x", x), _positive("y", y)
    series = np.array([""] * across.size if hue is None else [str(name) for name in hue])
    if not across.size == up.size == series.size or not across.size:
        raise ValueError(
            "x, y, hue: expected equal lengths of at least one, got "
            f"{across.size}, {up.size} and {series.size}"
        )
    names = list(dict.fromkeys(series.tolist()))
    chart = open_chart(names, role=role, height=0.92, width=width, ax=ax, legend=legend)
    both = np.concatenate([across, up])
    for which in ("x", "y"):
        fix_scale(chart.ax, which, both, log=True, limits=limits, inches=3.2)
    ends = chart.ax.get_xlim()
    chart.ax.plot(ends, ends, color=FAINT, lw=1.2, ls=(0, (4, 2)), zorder=1.5)
    for name, look in chart.marks.items():
        chart.ax.scatter(
            across[series == name], up[series == name], s=34, marker=look.marker,
            color=look.colour, alpha=0.75, edgecolors="white", linewidths=0.5, zorder=3,
        )  # fmt: skip
    chart.ax.set_aspect("equal", adjustable="box")
    chart.ax.set(xlabel=x_label, ylabel=y_label)
    return chart.finish(chart.handles(lines=False), None if hue is None else hue_label)


def _positive(name: str, values: Numbers) -> np.ndarray:
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, float)
    bad = int((~(np.isfinite(array) & (array > 0))).sum())
    if array.ndim != 1 or bad:
        raise ValueError(
            f"{name}: expected positive finite values (points,), got shape {array.shape} with "
            f"{bad} others; leave them out and say in the text how many"
        )
    return array
