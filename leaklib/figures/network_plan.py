"""What a diagram of networks shows of each layer, and where there is room for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pandas as pd

from leaklib.figures.lettering import text_inches
from leaklib.figures.look import SMALL_PT

COLUMNS = ("layer", "kind", "input", "unknowns", "deficit")
TIMES = "\N{MULTIPLICATION SIGN}"

EDGE = 0.08  # inches, like all sizes below
LINE = 0.2
TALLEST = 0.95  # box of the largest picture
LOWEST = 0.3
NARROWEST = 0.2
WIDEST = 1.1
ARROW = 0.16  # the least between two boxes
INSIDE = 0.1  # between a number and the edges of its box
SKIP = 0.13  # room for lines above the boxes
DOT = 0.05
SMALLEST_TYPE = 7.5  # points


class HasTable(Protocol):
    """A report that gives its table, such as `leaklib.rank.RankReport`."""

    def table(self) -> pd.DataFrame:
        """One row a layer."""


@dataclass(frozen=True)
class Layer:
    """One layer of a table."""

    name: list[str]
    shape: tuple[int, ...]
    number: str
    share: float
    skips: bool


@dataclass(frozen=True)
class Plan:
    """What all rows of a figure share, in inches; `points` is the size of type."""

    pitch: float
    points: float
    lines: int  # of a layer's name
    size_lines: int  # of an input's size
    skips: bool
    last: str

    @property
    def above(self) -> float:
        """From the top of a row to the box of its largest picture."""
        return (1.4 + 0.85 * self.lines) * LINE + SKIP * self.skips

    @property
    def height(self) -> float:
        """Of one row."""
        return self.above + TALLEST + (0.7 + 0.85 * self.size_lines) * LINE


def read_tables(networks: Mapping[str, pd.DataFrame | HasTable]) -> dict[str, pd.DataFrame]:
    """Tables by name.

    Raises:
        ValueError: no mapping, or an empty one.
    """
    if not isinstance(networks, Mapping) or not networks:
        raise ValueError(
            "networks: expected a mapping of one or more names to tables, got "
            f"{'none' if isinstance(networks, Mapping) else type(networks).__name__}; pass "
            "{name: report}"
        )
    return {
        str(name): item if isinstance(item, pd.DataFrame) else item.table()
        for name, item in networks.items()
    }


def read_layers(name: str, table: pd.DataFrame) -> list[Layer]:
    """The rows of one table.

    Raises:
        ValueError: no rows, a missing column, or deficits that are none.
    """
    missing = [column for column in COLUMNS if column not in table]
    if missing or not len(table):
        raise ValueError(
            f"{name!r}: expected one row or more with the columns {COLUMNS}, got {len(table)} rows "
            f"without {missing}; pass RankReport.table()"
        )
    deficits, unknowns = table["deficit"].tolist(), table["unknowns"].tolist()
    if not all(-n <= deficit <= 0 for deficit, n in zip(deficits, unknowns, strict=True)):
        raise ValueError(
            f"{name!r}: expected deficits between −unknowns and 0, got {deficits}; the deficit is "
            "rank − unknowns"
        )
    return [
        # the last two parts of a module path, one below the other
        Layer(
            str(layer).split(".")[-2:],
            tuple(int(length) for length in str(size).split("x")),
            f"{int(deficit)}".replace("-", "\N{MINUS SIGN}"),
            -deficit / n,
            kind == "residual",
        )
        for layer, size, kind, deficit, n in zip(
            table["layer"], table["input"], table["kind"], deficits, unknowns, strict=True
        )
    ]


def make_plan(rows: Iterable[list[Layer]], inches: float, last: str) -> Plan:
    """Type as large as the columns allow; a size in one line where it fits.

    Raises:
        ValueError: it would be too small to read.
    """
    every = [layer for row in rows for layer in row]
    columns = max(len(row) for row in rows)
    pitch = (inches - 2 * EDGE - text_inches(last) - 4 * DOT) / columns
    sizes, size_lines = [TIMES.join(map(str, layer.shape)) for layer in every], 1
    if max(map(text_inches, sizes)) > pitch - 0.1:
        sizes, size_lines = [line for layer in every for line in two_lines(layer.shape)], 2
    words = [*sizes, *(part for layer in every for part in layer.name)]
    room = min(
        (pitch - 0.08) / max(map(text_inches, words)),
        (pitch - ARROW - INSIDE) / max(text_inches(layer.number) for layer in every),
    )
    points = SMALL_PT * min(1.0, room)
    if points < SMALLEST_TYPE:
        raise ValueError(
            f"width: {columns} layers leave {max(pitch, 0.0):.2f} inches each, too few to read; "
            "draw the page wide, or only the layers of interest"
        )
    return Plan(
        pitch, points, max(len(layer.name) for layer in every), size_lines,
        any(layer.skips for layer in every), last,
    )  # fmt: skip


def box_sizes(row: Sequence[Layer], plan: Plan) -> list[tuple[float, float]]:
    """Width and height of each box: the logarithm of the channels, the root of the side."""
    pictures = [layer.shape for layer in row if len(layer.shape) == 3] or [(1, 1, 1)]
    side = max(max(shape[1:]) for shape in pictures)
    channels = max(2, *(shape[0] for shape in pictures))
    widest = min(plan.pitch - ARROW, WIDEST)
    sizes = []
    for layer in row:
        wide, high = 0.0, 0.75 * TALLEST
        if len(layer.shape) == 3:
            share = math.log(layer.shape[0]) / math.log(channels)
            wide = NARROWEST + (widest - NARROWEST) * share
            high = max(LOWEST, TALLEST * math.sqrt(max(layer.shape[1:]) / side))
        sizes.append((max(wide, text_inches(layer.number, plan.points) + INSIDE), high))
    return sizes


def two_lines(shape: tuple[int, ...]) -> list[str]:
    """Channels above height and width; a vector has one line."""
    if len(shape) < 3:
        return [TIMES.join(map(str, shape))]
    return [f"{shape[0]}{TIMES}", f"{shape[1]}{TIMES}{shape[2]}"]
