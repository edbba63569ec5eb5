"""Axis limits and ticks fixed from the data: no automatic choice is left to the drawing.

A figure then shows the same labels at any resolution and under any matplotlib version.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from leaklib.figures.lettering import number_texts, text_inches

Which = Literal["x", "y"]


def fix_scale(
    ax: Axes,
    which: Which,
    values: np.ndarray,
    *,
    log: bool,
    limits: tuple[float, float] | None = None,
    wanted: np.ndarray | None = None,
    inches: float = 3.6,
) -> None:
    """Set scale, limits and ticks of one axis from the values drawn along it.

    A log axis whose smallest value is 0 becomes linear between 0 and the smallest positive value
    and logarithmic beyond it, so that "no noise" stands beside the smallest noise.

    Args:
        ax: axes to set.
        which: "x" or "y".
        values: every finite number drawn along this axis.
        log: logarithmic, with 0 allowed.
        limits: fixed limits instead of those of the data with a margin.
        wanted: tick at these values where there is room, instead of at round numbers.
        inches: rough length of the axis, for how many labels fit.

    Raises:
        ValueError: nothing finite to draw, or a negative number on a log axis.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if values.size == 0:
        raise ValueError(
            f"{which} axis: expected at least one finite value, got none; is the table empty?"
        )
    axis = ax.xaxis if which == "x" else ax.yaxis
    set_scale = ax.set_xscale if which == "x" else ax.set_yscale
    set_limits = ax.set_xlim if which == "x" else ax.set_ylim
    knee: float | None = None
    if not log:
        set_scale("linear")
    elif values.min() > 0:
        set_scale("log")
    elif values.min() == 0 and values.max() > 0:
        knee = float(values[values > 0].min())
        set_scale("symlog", linthresh=knee, linscale=0.6)
    else:
        raise ValueError(
            f"{which} axis: a log axis needs values of at least 0, one of them positive, got "
            f"{values.min():g} to {values.max():g}; pass log_{which}=False"
        )
    transform = axis.get_transform()
    if limits is None:
        low, high = (
            float(end) for end in transform.transform(np.array([values.min(), values.max()]))
        )
        margin = 0.05 * (high - low) or 0.5 * max(abs(low), 1.0) * (0.5 if not log else 1.0)
        ends = transform.inverted().transform(np.array([low - margin, high + margin]))
        limits = float(ends[0]), float(ends[1])
    set_limits(*limits)
    ticks = round_ticks(*limits, log=log, knee=knee) if wanted is None else np.unique(wanted)
    ticks = ticks[(ticks >= min(limits)) & (ticks <= max(limits))]
    places = transform.transform(ticks)
    ends = transform.transform(np.array(limits))
    positions = (places - ends[0]) / (ends[1] - ends[0]) * inches
    kept = _with_room(ticks, positions, along=which)
    axis.set_major_locator(FixedLocator(kept.tolist()))
    texts = number_texts(kept)
    axis.set_major_formatter(FixedFormatter(texts))
    if which == "x" and any(text.startswith("$") for text in texts):
        # Tick labels hang from their tops, so that a plain 0 would stand above the powers of ten.
        ax.tick_params(axis="x", pad=14)
        for tick in axis.get_major_ticks(len(texts)):
            tick.label1.set_verticalalignment("baseline")
    axis.set_minor_locator(NullLocator())


def fix_rate(ax: Axes, which: Which) -> None:
    """Set one axis to rates: from 0 to 1, labelled in quarters."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xlim if which == "x" else ax.set_ylim)(0.0, 1.0)
    axis.set_major_locator(FixedLocator([0.0, 0.25, 0.5, 0.75, 1.0]))
    axis.set_major_formatter(FixedFormatter(["0", "0.25", "0.5", "0.75", "1"]))
    axis.set_minor_locator(NullLocator())


def round_ticks(low: float, high: float, *, log: bool, knee: float | None = None) -> np.ndarray:
    """Round numbers between two limits: decades, or 1-2-5 steps where there are too few.

    Args:
        low: lower limit; 0 or below it on a log axis with 0.
        high: upper limit.
        log: logarithmic.
        knee: where a log axis with 0 becomes linear.

    >>> round_ticks(0.5, 2000.0, log=True).tolist()
    [1.0, 10.0, 100.0, 1000.0]
    """
    if not log:
        locator = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10])
        steps = np.asarray(locator.tick_values(low, high), dtype=float)
        return steps[(steps >= low - 1e-12) & (steps <= high + 1e-12)]
    zero = [0.0] if low <= 0 else []
    floor = low if low > 0 else knee or high / 1e3
    powers = range(math.floor(math.log10(floor)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**power for power in powers if floor <= 10.0**power <= high]
    if len(decades) < 2:
        decades = [m * 10.0**p for p in powers for m in (1, 2, 5) if floor <= m * 10.0**p <= high]
    every = -(-len(decades) // 7)
    return np.array(zero + decades[::every])


def _with_room(ticks: np.ndarray, positions: np.ndarray, *, along: Which) -> np.ndarray:
    """Drop, from the first tick on, each one whose label would touch the one before it."""
    kept: list[float] = []
    end = -math.inf
    texts = number_texts(ticks)
    for value, text, position in zip(ticks.tolist(), texts, positions.tolist(), strict=True):
        half = text_inches(text) / 2 if along == "x" else 0.08
        if position - half >= end + 0.08:
            kept.append(value)
            end = position + half
    return np.array(kept)
