"""What every chart shares: its axes, its series and their looks, and the checks on its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from leaklib.figures.lettering import Legend, draw_legend, legend_inches
from leaklib.figures.look import Look, looks, width_in_inches


@dataclass(frozen=True)
class Chart:
    """Axes to draw into and a look for each series, in the order of the legend."""

    figure: Figure
    ax: Axes
    marks: dict[str, Look]
    legend: Legend

    def finish(self, handles: Sequence[object], title: str | None) -> Figure:
        """Draw the legend, if the series have names, and return the figure."""
        if title is not None:
            draw_legend(self.ax, handles, title, self.legend)
        return self.figure

    def handles(self, *, lines: bool = True) -> list[Line2D]:
        """Legend entries as lines with markers, or as markers alone."""
        return [
            Line2D(
                [], [], color=look.colour, ls=look.linestyle if lines else "none",
                marker=look.marker, label=name,
            )
            for name, look in self.marks.items()
        ]  # fmt: skip


def open_chart(
    names: Sequence[str],
    *,
    role: str,
    height: float,
    width: str | float,
    ax: Axes | None,
    legend: Legend,
    marks: Mapping[str, Look] | None = None,
) -> Chart:
    """A figure of its own, made higher by its legend, or the axes that were passed in.

    Args:
        names: series in order; a single empty name stands for "no hue".
        role: look of the series without a name.
        height: inches without the legend; below 1.0 it is a share of the width.
        width: 'column', 'page' or inches.
        ax: axes to draw into instead.
        legend: where; 'auto' is above the figure, or above the axes if these were passed in.
        marks: a look for each series, as `looks` gives them for all series of several figures.

    Raises:
        ValueError: marks that lack a series, or axes without a figure.
    """
    named = list(names) != [""]
    if named and marks is not None:
        if missing := [name for name in names if name not in marks]:
            raise ValueError(
                f"marks: expected a look for every series, got none for {missing}; "
                "pass looks(names) of the names in all figures"
            )
        marks = {name: marks[name] for name in names}
    else:
        marks = looks(names) if named else {"": looks([role])[role]}
    if ax is not None:
        figure = ax.get_figure(root=True)
        if figure is None:
            raise ValueError("ax: expected axes of a figure, got axes that belong to none")
        return Chart(figure, ax, marks, "axes" if legend == "auto" else legend)
    inches = width_in_inches(width)
    place: Legend = "figure" if legend == "auto" else legend
    extra = legend_inches(list(marks), inches) if named and place != "none" else 0.0
    tall = (height * inches if height < 1.0 else height) + extra
    figure = Figure(figsize=(inches, round(tall, 2)), layout="constrained")
    return Chart(figure, figure.subplots(), marks, place)


def series_names(table: pd.DataFrame, hue: str | None) -> list[str]:
    """Names of the series: numbers ascending, anything else in the order of the table."""
    if hue is None:
        return [""]
    values = table[hue].drop_duplicates()
    return [
        str(value) for value in (values.sort_values() if values.dtype.kind in "iuf" else values)
    ]


def series_of(table: pd.DataFrame, hue: str | None) -> np.ndarray:
    """Name of the series of each row, `(rows,)`."""
    return np.array([""] * len(table) if hue is None else [str(value) for value in table[hue]])


def check_table(name: str, table: pd.DataFrame, columns: Sequence[str | None]) -> None:
    """Refuse an empty table, or one that lacks a column, listing those it has."""
    if missing := [column for column in columns if column and column not in table.columns]:
        raise ValueError(f"{name}: expected columns {missing}, got {list(table.columns)}")
    if table.empty:
        raise ValueError(f"{name}: expected at least one row, got none")


def check_unique(name: str, table: pd.DataFrame, keys: Sequence[str | None], advice: str) -> None:
    """Refuse rows that cannot be told apart, of which one would hide the other, or have no name."""
    given = [key for key in keys if key]
    if unnamed := [key for key in given if table[key].isna().any()]:
        raise ValueError(f"{name}: expected a value in every row of {unnamed}, got missing ones")
    again = table.duplicated(given)
    if again.any():
        first = table.loc[again, given].iloc[0].to_dict()
        raise ValueError(
            f"{name}: expected one row for each of {given}, got {first} twice; {advice}"
        )


def interval_ends(
    name: str, table: pd.DataFrame, columns: tuple[str, str, str], *, rate: bool
) -> np.ndarray:
    """Low, middle and high of each row, `(rows, 3)`, checked to be in this order.

    Args:
        name: what to call the table in a message.
        table: the rows.
        columns: low, middle, high.
        rate: also refuse what lies outside [0,1].
    """
    ends = table[list(columns)].to_numpy(dtype=float, na_value=np.nan)
    known = ends[np.isfinite(ends).all(axis=1)]
    if (np.diff(known, axis=1) < -1e-9).any():
        raise ValueError(f"{name}: expected {' <= '.join(columns)} in every row")
    if rate and known.size and (known.min() < -1e-9 or known.max() > 1 + 1e-9):
        raise ValueError(
            f"{name}: expected {', '.join(columns)} in [0,1], got {known.min():g} to "
            f"{known.max():g}; divide percentages by 100"
        )
    return ends
