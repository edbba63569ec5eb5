"""Rates and means by category, each with its interval: bars and dots."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from leaklib.figures.lettering import Legend
from leaklib.figures.look import FAINT, INK, SMALL_PT, styled
from leaklib.figures.rows import SLOT, place_rows
from leaklib.figures.series import (
    check_table,
    check_unique,
    interval_ends,
    open_chart,
    series_names,
)
from leaklib.figures.ticks import fix_rate, fix_scale

AXIS = 0.68  # inches taken by the x axis and its label
ADVICE = "name the column that tells them apart as hue or group"


@styled
def rate_bars(
    table: pd.DataFrame,
    *,
    category: str,
    estimate: str,
    low: str,
    high: str,
    hue: str | None = None,
    group: str | None = None,
    n: str | None = None,
    x_label: str = "success rate",
    role: str = "plain",
    width: str | float = "page",
    legend: Legend = "auto",
    ax: Axes | None = None,
) -> Figure:
    """Horizontal bars from 0 to 1 with confidence intervals, in the order of the table.

    Args:
        table: one row per bar; a missing estimate or end is written as "no data".
        category: column named on the y axis; long names are broken into lines.
        estimate: column of rates in [0,1].
        low: column of lower ends of the interval.
        high: column of upper ends of the interval.
        hue: column that splits a category into bars below each other (an attack, a setting).
        group: column that gathers categories under a heading (a factor and its settings).
        n: column of trial counts, written at the right of each bar.
        x_label: what the rate is.
        role: look of the bars when there is no hue, for example "dlg".
        width: 'column', 'page' or inches; the height follows the number of rows.
        legend: 'auto', 'figure', 'axes' or 'none'.
        ax: draw into these axes instead of a figure of its own.

    Raises:
        ValueError: an unknown column, a repeated row, or low <= estimate <= high in [0,1] violated.
    """
    check_table("table", table, [category, estimate, low, high, hue, group, n])
    check_unique("table", table, [group, category, hue], ADVICE)
    rows = place_rows(table, category=category, hue=hue, group=group)
    ends = interval_ends("table", rows.table, (low, estimate, high), rate=True)
    drawn = np.isfinite(ends).all(axis=1)
    chart = open_chart(
        series_names(table, hue), role=role, height=rows.height + AXIS, width=width, ax=ax,
        legend=legend,
    )  # fmt: skip
    for name, look in chart.marks.items():
        part = drawn & (rows.series == name)
        lower, middle, upper = ends[part].T
        chart.ax.barh(
            rows.y[part], middle, height=0.86 * SLOT, color=look.colour, edgecolor="white",
            hatch=look.hatch, linewidth=0.6,
        )  # fmt: skip
        chart.ax.errorbar(
            middle, rows.y[part], xerr=_arms(lower, middle, upper), fmt="none", ecolor=INK,
            elinewidth=1.2, capsize=3, capthick=1.2, clip_on=False,
        )  # fmt: skip
    fix_rate(chart.ax, "x")
    chart.ax.set_xlabel(x_label)
    rows.finish(chart.ax, drawn, n)
    handles = [
        Patch(facecolor=look.colour, edgecolor="white", hatch=look.hatch, label=name)
        for name, look in chart.marks.items()
    ]
    return chart.finish(handles, hue)


@styled
def dot_intervals(
    table: pd.DataFrame,
    *,
    category: str,
    value: str,
    low: str,
    high: str,
    hue: str | None = None,
    group: str | None = None,
    n: str | None = None,
    x_label: str = "PSNR (dB)",
    reference: float | None = None,
    reference_label: str = "",
    log_x: bool = False,
    limits: tuple[float, float] | None = None,
    role: str = "plain",
    width: str | float = "page",
    legend: Legend = "auto",
    ax: Axes | None = None,
) -> Figure:
    """A dot with its interval per row, in the order of the table: means of PSNR, for example.

    Args:
        table: one row per dot; a missing value or end is written as "no data".
        category: column named on the y axis; long names are broken into lines.
        value: column of dots.
        low: column of lower ends of the interval.
        high: column of upper ends of the interval.
        hue: column that splits a category into dots below each other.
        group: column that gathers categories under a heading.
        n: column of trial counts, written at the right of each row.
        x_label: what the value is, with its unit.
        reference: a vertical line here, such as the threshold of success.
        reference_label: written above that line.
        log_x: logarithmic axis.
        limits: ends of the x axis; by default those of the intervals with a margin.
        role: look of the dots when there is no hue.
        width: 'column', 'page' or inches; the height follows the number of rows.
        legend: 'auto', 'figure', 'axes' or 'none'.
        ax: draw into these axes instead of a figure of its own.

    Raises:
        ValueError: an unknown column, a repeated row, or low <= value <= high violated.
    """
    check_table("table", table, [category, value, low, high, hue, group, n])
    check_unique("table", table, [group, category, hue], ADVICE)
    rows = place_rows(table, category=category, hue=hue, group=group)
    ends = interval_ends("table", rows.table, (low, value, high), rate=False)
    drawn = np.isfinite(ends).all(axis=1)
    extra = AXIS + (0.22 if reference_label else 0.0)
    chart = open_chart(
        series_names(table, hue), role=role, height=rows.height + extra, width=width, ax=ax,
        legend=legend,
    )  # fmt: skip
    for name, look in chart.marks.items():
        part = drawn & (rows.series == name)
        lower, middle, upper = ends[part].T
        chart.ax.errorbar(
            middle, rows.y[part], xerr=_arms(lower, middle, upper), fmt=look.marker,
            color=look.colour, elinewidth=1.6, capsize=3, capthick=1.6,
        )  # fmt: skip
    if reference is not None:
        chart.ax.axvline(reference, color=FAINT, lw=1.2, ls=(0, (4, 2)), zorder=0.9)
        chart.ax.annotate(
            reference_label, (reference, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", fontsize=SMALL_PT, color=FAINT,
        )  # fmt: skip
    along = np.append(ends[drawn], [] if reference is None else [reference])
    fix_scale(chart.ax, "x", along, log=log_x, limits=limits)
    chart.ax.set_xlabel(x_label)
    rows.finish(chart.ax, drawn, n)
    return chart.finish(chart.handles(lines=False), hue)


def _arms(low: np.ndarray, middle: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.maximum(np.stack([middle - low, high - middle]), 0.0)
