"""Where the tiles of a figure of images lie: one axes, whose units are pixels of the PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from leaklib.figures.lettering import text_inches, wrap
from leaklib.figures.look import INK, PNG_DPI, SMALL_PT

LARGEST_TILE = 1.5  # inches
SMALLEST_TILE = 0.3
SMALLEST_TYPE = 7.5  # points
LINE = 0.19  # inches from one line of text to the next
ASCENT = 0.12  # from the top of a line to its baseline
GAP = 0.06
EDGE = 0.08
ROW_LETTERS = 14


@dataclass(frozen=True)
class Page:
    """Sizes in inches; places are measured from the upper left corner."""

    width: float
    margin: float  # left edge of the first tile
    tile_width: float
    tile_height: float
    columns: int
    set_off: float  # of the last column

    @classmethod
    def fit(
        cls,
        size: tuple[int, ...],
        columns: int,
        names: Sequence[str],
        *,
        width: float,
        set_off: float = 0.0,
    ) -> Page:
        """Tiles as large as the width allows.

        An image pixel becomes a whole number of PNG pixels, unless that would cost more than an
        eighth of the tile.

        Args:
            size: height and width of an image in pixels.
            columns: tiles across.
            names: row labels, which take the left margin.
            width: the most the figure may take.
            set_off: extra space before the last column.

        Raises:
            ValueError: tiles would be too small to read.
        """
        tall, broad = size
        label = max((text_inches(wrap(name, ROW_LETTERS)) for name in names), default=0.0)
        margin = EDGE + (label + 0.1 if label else 0.0)
        room = (width - margin - EDGE - set_off - GAP * (columns - 1)) / columns
        pixels = int(min(room, LARGEST_TILE) * PNG_DPI)
        if pixels >= broad and pixels % broad <= pixels / 8:
            pixels -= pixels % broad
        tile = pixels / PNG_DPI
        if tile < SMALLEST_TILE:
            raise ValueError(
                f"width: {columns} columns in {width:g} inches leave {max(tile, 0.0):.2f} inches a "
                "picture, too few to read; draw fewer columns, for example every second frame"
            )
        taken = margin + EDGE + set_off + GAP * (columns - 1) + tile * columns
        height = round(pixels * tall / broad) / PNG_DPI
        return cls(max(taken, 2.4), margin, tile, height, columns, set_off)

    def points(self, texts: Sequence[str]) -> float:
        """Size of type at which each of these texts fits above or below its tile.

        Raises:
            ValueError: the type would be too small to read.
        """
        widest = max((text_inches(text) for text in texts), default=0.0)
        size = SMALL_PT * min(1.0, (self.tile_width + GAP - 0.03) / widest) if widest else SMALL_PT
        if size < SMALLEST_TYPE:
            longest = max(texts, key=text_inches)
            raise ValueError(
                f"expected text that fits {self.tile_width:.2f} inches, got {longest!r}; shorten "
                "it or draw fewer columns"
            )
        return size

    def open(self, height: float) -> tuple[Figure, Axes]:
        """The figure, `height` inches between its edges, and one axes over all of it."""
        pixels = round(self.width * PNG_DPI), round((height + 2 * EDGE) * PNG_DPI)
        figure = Figure(figsize=(pixels[0] / PNG_DPI, pixels[1] / PNG_DPI))
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, pixels[0]), ylim=(pixels[1], 0))
        ax.set_axis_off()
        return figure, ax

    def left(self, column: int) -> float:
        """Left edge of a column."""
        set_off = self.set_off if column == self.columns - 1 else 0.0
        return self.margin + column * (self.tile_width + GAP) + set_off

    def text(
        self, ax: Axes, x: float, top: float, text: str, *, colour: str = INK, ha: str = "center",
        points: float = SMALL_PT,
    ) -> None:  # fmt: skip
        """Write one or more lines, the last of which lies between `top` and `top` + LINE."""
        baseline = (top + EDGE + ASCENT) * PNG_DPI
        ax.text(
            x * PNG_DPI, baseline, text, color=colour, ha=ha, va="baseline",
            fontsize=points,
        )  # fmt: skip

    def caption(self, ax: Axes, column: int, top: float, text: str, points: float) -> None:
        """Write text in the middle of a column."""
        self.text(ax, self.left(column) + self.tile_width / 2, top, text, points=points)

    def row_label(self, ax: Axes, top: float, name: str) -> None:
        """Write a row's name in the left margin, at the middle of its tiles."""
        middle = (top + EDGE + self.tile_height / 2) * PNG_DPI
        ax.text(
            (self.margin - 0.1) * PNG_DPI, middle, wrap(name, ROW_LETTERS), ha="right",
            va="center", fontsize=SMALL_PT,
        )  # fmt: skip

    def tile(
        self, ax: Axes, column: int, top: float, image: np.ndarray, *, strong: bool = False
    ) -> None:
        """Draw one image `(channels, height, width)`, or a hatched tile if it is not finite."""
        x, y = round(self.left(column) * PNG_DPI), round((top + EDGE) * PNG_DPI)
        broad, tall = round(self.tile_width * PNG_DPI), round(self.tile_height * PNG_DPI)
        if not np.isfinite(image).all():
            hatched = Rectangle((x, y), broad, tall, hatch="///", lw=0.6)
            hatched.set(facecolor="#EEEEEE", edgecolor="#9A9A9A")
            ax.add_patch(hatched)
            points = min(SMALL_PT - 1, 0.85 * SMALL_PT * self.tile_width / text_inches("failed"))
            ax.text(
                x + broad / 2, y + tall / 2, "failed", ha="center", va="center", fontsize=points,
                bbox={"facecolor": "#EEEEEE", "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
            return
        limits = ax.get_xlim(), ax.get_ylim()
        pixels = np.clip(np.moveaxis(image, 0, -1), 0.0, 1.0)
        ax.imshow(
            pixels[..., 0] if pixels.shape[-1] == 1 else pixels,
            cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto",
            extent=(x, x + broad, y + tall, y),
        )  # fmt: skip
        ax.set(xlim=limits[0], ylim=limits[1])
        edge, line = (INK, 1.4) if strong else ("#B5B5B5", 0.6)
        ax.add_patch(Rectangle((x, y), broad, tall, fill=False, edgecolor=edge, lw=line))
