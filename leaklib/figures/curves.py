"""Curves against a number: convergence of attacks, and success rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from leaklib.figures.lettering import Legend
from leaklib.figures.look import FAINT, SMALL_PT, Look, styled
from leaklib.figures.series import (
    check_table,
    check_unique,
    interval_ends,
    open_chart,
    series_names,
    series_of,
)
from leaklib.figures.ticks import fix_rate, fix_scale

HEIGHT = 0.68  # of the width


@styled
def convergence(
    curves: pd.DataFrame,
    *,
    x: str = "evaluations",
    y: str,
    hue: str | None = None,
    unit: str | Sequence[str] = "victim",
    log_x: bool = True,
    log_y: bool = True,
    x_label: str | None = None,
    y_label: str | None = None,
    y_limits: tuple[float, float] | None = None,
    reference: float | None = None,
    reference_label: str = "",
    role: str = "plain",
    width: str | float = "column",
    legend: Legend = "auto",
    marks: Mapping[str, Look] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Every run as a thin line and the median of each hue as a thick one.

    Between its own points a run is read off its line; a run that has stopped keeps its last value
    in the median, as its picture does. The median starts where half of the runs have begun. Rows
    whose value is not finite are left out, and on a log axis those whose value is not positive.

    Args:
        curves: one row per run and point.
        x: column of positions, usually gradient evaluations; 0 is allowed on a log axis.
        y: column of values.
        hue: column that names the lines (an attack, a setting).
        unit: column or columns that tell the runs of one hue apart.
        log_x: logarithmic x axis.
        log_y: logarithmic y axis; pass False for decibels.
        x_label: axis label; the column's name by default.
        y_label: axis label; the column's name by default.
        y_limits: ends of the y axis; by default those of the values with a margin.
        reference: a horizontal line here, such as the threshold of success.
        reference_label: written at the left end of that line.
        role: look when there is no hue.
        width: 'column', 'page' or inches.
        legend: 'auto', 'figure', 'axes' or 'none'.
        marks: name -> look, such as `looks` of the names in several figures; None: this figure's.
        ax: draw into these axes instead of a figure of its own.

    Raises:
        ValueError: an unknown column, nothing to draw, or two rows for one point of one run.
    """
    units = [unit] if isinstance(unit, str) else list(unit)
    check_table("curves", curves, [x, y, hue, *units])
    check_unique("curves", curves, [hue, *units, x], "name what tells the runs apart in unit")
    values = curves[y].to_numpy(dtype=float, na_value=np.nan)
    with np.errstate(invalid="ignore"):
        shown = curves[np.isfinite(values) & ((values > 0) | (not log_y))]
    check_table(f"finite{' positive' if log_y else ''} {y} in curves", shown, [])
    shown = shown.sort_values(x, kind="stable")
    chart = open_chart(
        series_names(shown, hue), role=role, height=HEIGHT, width=width, ax=ax, legend=legend,
        marks=marks,
    )  # fmt: skip
    series = series_of(shown, hue)
    for name, look in chart.marks.items():
        runs = [
            (run[x].to_numpy(dtype=float), run[y].to_numpy(dtype=float))
            for _, run in shown[series == name].groupby(units, sort=False)
        ]
        for run in runs if len(runs) > 1 else ():
            chart.ax.plot(*run, color=look.colour, lw=0.8, alpha=0.35, zorder=2)
        chart.ax.plot(
            *_median(runs, log_y=log_y), color=look.colour, ls=look.linestyle, lw=2.2,
            marker=look.marker, markevery=[-1], zorder=3,
        )  # fmt: skip
    up = shown[y].to_numpy(dtype=float)
    if reference is not None:
        up = np.append(up, reference)
        chart.ax.axhline(reference, color=FAINT, lw=1.2, ls=(0, (4, 2)), zorder=1.5)
        chart.ax.annotate(
            reference_label, (0, reference), xycoords=("axes fraction", "data"), xytext=(4, 2),
            textcoords="offset points", va="bottom", fontsize=SMALL_PT, color=FAINT, zorder=4,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    fix_scale(chart.ax, "x", shown[x].to_numpy(dtype=float), log=log_x)
    fix_scale(chart.ax, "y", up, log=log_y, limits=y_limits, inches=2.6)
    chart.ax.set(xlabel=x_label or x.replace("_", " "), ylabel=y_label or y.replace("_", " "))
    return chart.finish(chart.handles(), hue)


@styled
def rate_lines(
    table: pd.DataFrame,
    *,
    x: str,
    estimate: str,
    low: str | None = None,
    high: str | None = None,
    hue: str | None = None,
    log_x: bool = False,
    x_label: str | None = None,
    y_label: str = "success rate",
    role: str = "plain",
    width: str | float = "column",
    legend: Legend = "auto",
    marks: Mapping[str, Look] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A rate in [0,1] against a numeric factor, with its interval as a band, if it has one.

    Args:
        table: one row per point; rows with a missing number are left out.
        x: column of the factor (noise, epoch, batch size); 0 is allowed on a log axis.
        estimate: column of rates in [0,1].
        low: column of lower ends of the interval; None: the estimate. Where bands of many lines
            would hide each other leave out low and high, and no band is drawn.
        high: column of upper ends of the interval; None: the estimate.
        hue: column that names the lines.
        log_x: logarithmic x axis.
        x_label: axis label; the column's name by default.
        y_label: what the rate is.
        role: look when there is no hue.
        width: 'column', 'page' or inches.
        legend: 'auto', 'figure', 'axes' or 'none'.
        marks: name -> look, such as `looks` of the names in several figures; None: this figure's.
        ax: draw into these axes instead of a figure of its own.

    Raises:
        ValueError: an unknown column, a repeated point, or low <= estimate <= high in [0,1]
            violated.
    """
    banded = low is not None or high is not None
    low, high = low or estimate, high or estimate
    check_table("table", table, [x, estimate, low, high, hue])
    check_unique("table", table, [hue, x], "name the column that tells them apart as hue")
    shown = table.dropna(subset=[x, estimate, low, high]).sort_values(x, kind="stable")
    check_table("complete rows of table", shown, [])
    ends = interval_ends("table", shown, (low, estimate, high), rate=True)
    at = shown[x].to_numpy(dtype=float)
    series = series_of(shown, hue)
    chart = open_chart(
        series_names(table, hue), role=role, height=HEIGHT, width=width, ax=ax, legend=legend,
        marks=marks,
    )  # fmt: skip
    for name, look in chart.marks.items():
        here, (lower, middle, upper) = at[series == name], ends[series == name].T
        if banded:
            chart.ax.fill_between(here, lower, upper, color=look.colour, alpha=0.13, lw=0)
        for edge in (lower, upper) if banded else ():
            chart.ax.plot(here, edge, color=look.colour, lw=0.7, alpha=0.5, ls=look.linestyle)
        chart.ax.plot(
            here, middle, color=look.colour, ls=look.linestyle, marker=look.marker, clip_on=False,
            zorder=3,
        )  # fmt: skip
    fix_scale(chart.ax, "x", at, log=log_x, wanted=at if np.unique(at).size <= 8 else None)
    fix_rate(chart.ax, "y")
    chart.ax.set(xlabel=x_label or x.replace("_", " "), ylabel=y_label)
    return chart.finish(chart.handles(), hue)


def _median(
    runs: Sequence[tuple[np.ndarray, np.ndarray]], *, log_y: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Median over runs at every position that any run has, from where half of them have begun."""
    grid = np.unique(np.concatenate([at for at, _ in runs]))
    grid = grid[grid >= np.median([at[0] for at, _ in runs])]
    heights = [np.log(up) if log_y else up for _, up in runs]
    lines = np.stack(
        [np.interp(grid, at, up, left=np.nan) for (at, _), up in zip(runs, heights, strict=True)]
    )
    middle = np.nanmedian(lines, axis=0)
    return grid, np.exp(middle) if log_y else middle
