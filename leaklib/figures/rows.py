"""The categories of a horizontal chart laid out down the page, each as high as its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from leaklib.figures.lettering import text_inches, wrap
from leaklib.figures.look import FAINT, SMALL_PT
from leaklib.figures.series import series_names, series_of

LINE = 0.185  # inches of one line of text; y runs in inches, so that rows keep their height
SLOT = 0.24  # one bar
GAP = 0.12
HEADING = 0.32
LABEL_LETTERS = 24


@dataclass(frozen=True)
class Rows:
    """Rows in the order of their series, each with its place on the y axis."""

    table: pd.DataFrame
    series: np.ndarray  # name of each row's series
    y: np.ndarray  # middle of each row, inches from the top
    labels: list[tuple[float, str]]
    headings: list[tuple[float, str]]
    height: float

    def finish(self, ax: Axes, drawn: np.ndarray, n: str | None) -> None:
        """Name the categories, mark the rows without data and write the trial counts.

        Args:
            ax: axes whose y axis runs in inches from the top.
            drawn: which rows have data, `(rows,)`.
            n: column of trial counts, or None.
        """
        ax.set_ylim(self.height, 0.0)
        ax.yaxis.set_major_locator(FixedLocator([at for at, _ in self.labels]))
        ax.yaxis.set_major_formatter(FixedFormatter([text for _, text in self.labels]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False, axis="y")
        across = ax.get_yaxis_transform()
        for at, text in self.headings:
            ax.annotate(
                text, (0, at), xycoords=across, xytext=(-3.5, 0), textcoords="offset points",
                ha="right", va="center", fontweight="bold", fontsize=SMALL_PT,
            )  # fmt: skip
        for at in self.y[~drawn]:
            ax.annotate(
                "no data", (0, at), xycoords=across, xytext=(6, 0), textcoords="offset points",
                va="center", color=FAINT, fontsize=SMALL_PT, style="italic",
            )  # fmt: skip
        if n is None:
            return
        trials = [f"{int(count)}" for count in self.table[n]]
        trials[int(np.argmin(self.y))] = "n = " + trials[int(np.argmin(self.y))]
        right = 10 + 72 * max(map(text_inches, trials))
        for at, text in zip(self.y, trials, strict=True):
            ax.annotate(
                text, (1, at), xycoords=across, xytext=(right, 0), textcoords="offset points",
                ha="right", va="center", color=FAINT, fontsize=SMALL_PT,
            )  # fmt: skip


def place_rows(table: pd.DataFrame, *, category: str, hue: str | None, group: str | None) -> Rows:
    """Lay out the rows in the order in which groups, categories and series first appear.

    Args:
        table: one row for each group, category and hue.
        category: column of the labels on the y axis.
        hue: column that splits a category, or None.
        group: column that gathers categories under a heading, or None.
    """
    names = series_names(table, hue)
    numbered = table.reset_index(drop=True)
    numbered = numbered.iloc[
        np.argsort([names.index(name) for name in series_of(table, hue)], kind="stable")
    ]
    groups = [None] if group is None else list(dict.fromkeys(table[group]))
    y = np.empty(len(table))
    labels: list[tuple[float, str]] = []
    headings: list[tuple[float, str]] = []
    top = GAP / 2
    for head in groups:
        inside = (
            np.full(len(table), True) if group is None else (numbered[group] == head).to_numpy()
        )
        if group is not None:
            headings.append((top + 0.58 * HEADING, str(head).replace("_", " ")))
            top += HEADING
        order = table if group is None else table[table[group] == head]
        for label in dict.fromkeys(order[category]):
            here = np.flatnonzero(inside & (numbered[category] == label).to_numpy())
            text = wrap(label, LABEL_LETTERS)
            block = max(len(here) * SLOT, (text.count("\n") + 1) * LINE)
            y[here] = top + block / 2 + SLOT * (np.arange(len(here)) - (len(here) - 1) / 2)
            labels.append((top + block / 2, text))
            top += block + GAP
    return Rows(numbered, series_of(numbered, hue), y, labels, headings, top - GAP / 2)
