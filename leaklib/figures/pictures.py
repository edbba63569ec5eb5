"""Strips and grids of images: what was private beside what came back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from leaklib.figures.lettering import wrap
from leaklib.figures.look import FAINT, styled, width_in_inches
from leaklib.figures.page import GAP, LINE, Page

Images = torch.Tensor | np.ndarray
Captions = Sequence[Sequence[str | float]] | Images

SPACE = 0.04  # between a tile and the text below it
CAPTION = LINE + SPACE


@styled
def frames_strip(
    originals: Images,
    frames: Images,
    *,
    counts: Sequence[int],
    captions: Captions | None = None,
    row_labels: Sequence[str] | None = None,
    heading: str = "gradient evaluations",
    last: str = "private",
    note: str = "below each picture: PSNR in dB",
    width: str | float = "page",
) -> Figure:
    """A picture appears from its gradient: victims down, evaluations across, the private one last.

    Args:
        originals: private images `(victims, channels, height, width)`, 1 or 3 channels, in [0,1].
        frames: reconstructions `(victims, frames, channels, height, width)`; values are clamped to
            [0,1], and an image with a non-finite pixel is drawn as a hatched "failed" tile.
        counts: evaluations spent at each frame, `(frames,)`.
        captions: one per frame, `(victims, frames)`: strings, or numbers shown with one decimal.
        row_labels: one per victim.
        heading: what the counts count.
        last: name of the last column.
        note: what the captions are; drawn small at the foot, and only if there are captions.
        width: 'column', 'page' or inches; the figure is narrower if its tiles reach 1.5 inches.

    Raises:
        ValueError: shapes that do not fit each other, or more frames than fit the width.
    """
    private, shown = _images("originals", originals, 4), _images("frames", frames, 5)
    victims, across = shown.shape[:2]
    if private.shape != (victims, *shown.shape[2:]):
        raise ValueError(
            "originals and frames: expected (victims, channels, height, width) and (victims, "
            f"frames, channels, height, width), got {private.shape} and {shown.shape}"
        )
    names = [""] * victims if row_labels is None else _names("row_labels", row_labels, victims)
    heads = [_count_text(count) for count in _names("counts", counts, across)]
    texts = None if captions is None else _captions("captions", captions, victims, across)
    page = Page.fit(
        shown.shape[-2:], across + 1, names, width=width_in_inches(width), set_off=2.5 * GAP
    )
    large, small = page.points([*heads, last]), page.points([t for row in texts or [] for t in row])
    head = 2.2 * LINE
    row = page.tile_height + (CAPTION if texts else 0.0) + 1.5 * GAP
    foot = CAPTION if texts and note else 0.0
    figure, ax = page.open(head + victims * row - 1.5 * GAP + foot)
    middle = (page.left(0) + page.left(across - 1) + page.tile_width) / 2
    page.text(ax, middle, 0.0, heading, colour=FAINT)
    for column, text in enumerate([*heads, last]):
        page.caption(ax, column, 1.1 * LINE, text, large)
    for victim in range(victims):
        top = head + victim * row
        page.row_label(ax, top, names[victim])
        for column in range(across):
            page.tile(ax, column, top, shown[victim, column])
            if texts:
                under = top + page.tile_height + SPACE
                page.caption(ax, column, under, texts[victim][column], small)
        page.tile(ax, across, top, private[victim], strong=True)
    if foot:
        bottom = head + victims * row - 1.5 * GAP + SPACE
        page.text(ax, page.left(0), bottom, note, colour=FAINT, ha="left")
    return figure


@styled
def reconstruction_grid(
    rows: Mapping[str, Images],
    *,
    captions: Mapping[str, Sequence[str | float] | Images] | None = None,
    column_labels: Sequence[str] | None = None,
    note: str = "below each picture: PSNR in dB",
    per_line: int = 8,
    width: str | float = "page",
) -> Figure:
    """Named rows of images (private, DLG, ...), one victim a column; long rows go on below.

    Args:
        rows: name -> images `(victims, channels, height, width)`, all of one shape, 1 or 3
            channels; values are clamped to [0,1], and an image with a non-finite pixel is drawn as
            a hatched "failed" tile. A row named "private" or "original" is framed in black.
        captions: row name -> one caption per victim, strings or numbers with one decimal.
        column_labels: one per victim, above the first row.
        note: what the captions are; drawn small at the foot, and only if there are captions.
        per_line: victims side by side before the rows start again below.
        width: 'column', 'page' or inches; the figure is narrower if its tiles reach 1.5 inches.

    Raises:
        ValueError: no rows, rows of different shapes, or captions for a row that is not there.
    """
    images = {str(name): _images(f"rows[{name!r}]", value, 4) for name, value in rows.items()}
    shapes = {name: value.shape for name, value in images.items()}
    if not images or len({shape[0:1] + shape[2:] for shape in shapes.values()}) != 1:
        raise ValueError(f"rows: expected one or more rows of images of one shape, got {shapes}")
    victims, _, tall, broad = next(iter(shapes.values()))
    if unknown := sorted(set(captions or {}) - set(images)):
        raise ValueError(f"captions: expected names among {sorted(images)}, got {unknown}")
    texts = {
        name: _captions(f"captions[{name!r}]", [list(values)], 1, victims)[0]
        for name, values in (captions or {}).items()
    }
    heads = [] if column_labels is None else _names("column_labels", column_labels, victims)
    heads = [wrap(head, 10) for head in heads]
    if per_line < 1:
        raise ValueError(f"per_line: expected at least 1, got {per_line}")
    across = min(per_line, victims)
    page = Page.fit((tall, broad), across, list(images), width=width_in_inches(width))
    large, small = page.points(heads), page.points([t for row in texts.values() for t in row])
    head = LINE * max((text.count("\n") + 1 for text in heads), default=0)
    steps = {n: page.tile_height + GAP + (CAPTION if n in texts else 0.0) for n in images}
    block = head + sum(steps.values()) + 2 * GAP
    blocks = math.ceil(victims / across)
    foot = CAPTION if texts and note else 0.0
    figure, ax = page.open(blocks * block - 3 * GAP + foot)
    for victim in range(victims):
        line, column = divmod(victim, across)
        top = line * block + head
        if heads:
            page.caption(ax, column, top - LINE, heads[victim], large)
        for name, stack in images.items():
            if column == 0:
                page.row_label(ax, top, name)
            strong = name.casefold() in ("private", "original")
            page.tile(ax, column, top, stack[victim], strong=strong)
            if name in texts:
                under = top + page.tile_height + SPACE
                page.caption(ax, column, under, texts[name][victim], small)
            top += steps[name]
    if foot:
        bottom = blocks * block - 3 * GAP + SPACE
        page.text(ax, page.left(0), bottom, note, colour=FAINT, ha="left")
    return figure


def _images(name: str, images: Images, dimensions: int) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        images = images.detach().float().cpu().numpy() if images.is_floating_point() else images
    array = np.asarray(images)
    if array.ndim != dimensions or 0 in array.shape or array.shape[-3] not in (1, 3):
        form = "(victims, channels, height, width)"
        form = form if dimensions == 4 else form.replace("victims,", "victims, frames,")
        raise ValueError(
            f"{name}: expected {form} with 1 or 3 channels, got {array.shape}; a batch axis can be "
            "flattened with .flatten(0, 1)"
        )
    if array.dtype.kind != "f":
        raise ValueError(
            f"{name}: expected floating-point pixels in [0,1], got {array.dtype}; divide by 255"
        )
    return array


def _names(name: str, values: Sequence[object], expected: int) -> list[str]:
    if isinstance(values, str) or len(values) != expected:
        raise ValueError(f"{name}: expected {expected} entries, got {values!r}")
    return [str(value) for value in values]


def _captions(name: str, captions: Captions, rows: int, columns: int) -> list[list[str]]:
    values = captions.tolist() if isinstance(captions, torch.Tensor | np.ndarray) else captions
    if len(values) != rows or any(len(row) != columns for row in values):
        raise ValueError(f"{name}: expected {rows} x {columns} captions, got {captions!r}")
    return [[_caption(value) for value in row] for row in values]


def _caption(value: str | float) -> str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.1f}".replace("-", "−")


def _count_text(count: str) -> str:
    number = int(float(count))
    return f"{number:,}".replace(",", "\N{THIN SPACE}") if number >= 10_000 else str(number)
