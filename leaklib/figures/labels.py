"""Short texts beside points, where they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation

from leaklib.figures.lettering import text_inches

DISTANCES = (7.0, 15.0, 24.0, 34.0)  # points from the marker's middle to the text's nearest edge
DIRECTIONS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)])


def label_points(
    ax: Axes,
    points: np.ndarray,
    texts: Sequence[str],
    *,
    colours: Sequence[str],
    bars: np.ndarray | None = None,
    size: float = 9.0,
    marker: float = 7.0,
) -> list[Annotation]:
    """Write a text beside each point, joined to it by a thin line where it stands further off.

    Greedy: the most crowded points choose first, each the place nearest to it, of eight directions
    and four distances, that covers least of markers, bars, earlier texts and the axes' outside.
    Limits, scales and legends must be set before: the figure is laid out to measure.

    Args:
        ax: axes in which the points are drawn already.
        points: data coordinates `(points, 2)`, also of those without a text: none is covered.
        texts: one a point; empty: none is written.
        colours: of each text.
        bars: lower and upper ends `(points, 2)` of vertical bars, in data coordinates.
        size: of the type, in points.
        marker: width of a marker, in points.

    Returns:
        What was written, in the order of the points.

    Raises:
        ValueError: points of another shape, or numbers of points, texts, colours and bars differ.

    Cost: one layout of the figure, and 32 comparisons for each pair of points.
    """
    points = np.asarray(points, dtype=float)
    ends = points[:, 1:].repeat(2, axis=1) if bars is None else np.asarray(bars, dtype=float)
    if points.shape != (len(texts), 2) or len(colours) != len(texts) or ends.shape != points.shape:
        raise ValueError(
            "expected points (n, 2), n texts, n colours and bars (n, 2), got points "
            f"{points.shape}, {len(texts)} texts, {len(colours)} colours, bars {ends.shape}"
        )
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    unit = 72 / figure.dpi  # points a pixel
    at = ax.transData.transform(points) * unit
    foot = ax.transData.transform(np.column_stack([points[:, 0], ends[:, 0]]))[:, 1] * unit
    head = ax.transData.transform(np.column_stack([points[:, 0], ends[:, 1]]))[:, 1] * unit
    solid = [*np.column_stack([at - marker / 2, at + marker / 2])]
    solid += [*np.column_stack([at[:, 0] - 1, foot, at[:, 0] + 1, head])]
    inside = np.asarray(ax.get_window_extent().extents) * unit
    crowd = (np.abs(at[:, None] - at[None]) < 40).all(axis=2).sum(axis=1)
    # a text must not move the axes that it was measured in
    written: dict[int, Annotation] = {}
    for n in sorted((n for n, text in enumerate(texts) if text), key=lambda n: -crowd[n]):
        half = np.array([72 * text_inches(texts[n], size) / 2 + 1, 0.42 * size])
        place = _best(at[n], half, np.array(solid), inside)
        solid.append(np.concatenate([place - half, place + half]))
        far = np.abs(place - at[n]) - half
        line: dict[str, Any] = {"arrowstyle": "-", "color": colours[n], "lw": 0.8}
        line |= {"shrinkA": 0, "shrinkB": marker / 2}
        written[n] = ax.annotate(
            texts[n], points[n], place - at[n], textcoords="offset points", fontsize=size,
            color=colours[n], ha="center", va="center", zorder=5,
            arrowprops=line if far.max() > DISTANCES[0] + 1 else None,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        written[n].set_in_layout(False)
    return [written[n] for n in sorted(written)]


def _best(at: np.ndarray, half: np.ndarray, solid: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The middle of the box of this half size that covers least, the nearest of equals."""
    reach = np.array(DISTANCES)[:, None, None] * np.where(DIRECTIONS.all(axis=1), 0.7, 1)[:, None]
    places = (at + DIRECTIONS * (reach + half)).reshape(-1, 2)
    low, high = places - half, places + half
    shared = np.minimum(high[:, None], solid[:, 2:]) - np.maximum(low[:, None], solid[:, :2])
    covered = shared.clip(min=0).prod(axis=2).sum(axis=1)
    kept = np.minimum(high, inside[2:]) - np.maximum(low, inside[:2])
    outside = (4 * half.prod() - kept.clip(min=0).prod(axis=1)).clip(min=0)
    far = np.repeat(DISTANCES, len(DIRECTIONS))
    return places[int(np.argmin(covered + outside + 0.1 * far))]
