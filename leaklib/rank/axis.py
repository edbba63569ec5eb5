"""One axis of a convolution: which pixels its taps and its outputs meet.

Output o and tap t meet the pixel o·stride + t·dilation − padding. Along rows and columns the
pattern is the same, and a convolution in the plane is the product of the two. Gradient rows fall
apart by tap: taps whose offsets t·dilation leave one remainder modulo the stride meet pixels that
no other tap meets. Weight rows fall apart by output, by o·stride modulo the dilation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Sources (taps or outputs) that share pixels with each other and with no other source.

    A source has equations to spend, a pixel room for some. A flow of `least` pixels from every
    source is possible, each to pixels it meets and at most one in all to a pixel; a flow that fills
    every pixel needs a source that can spend `most`. Both are pixels/sources where the picture's
    edge cuts off nothing.

    Args:
        sources: number of taps or outputs that meet a pixel.
        pixels: number of pixels that they meet.
        least: the largest flow that every source can send.
        most: the smallest capacity of a source at which all pixels can be filled.
        pattern: for every source its first partner (of a tap, an output), their number, and the
            pixel it meets there. Parts of one pattern have equations of one form.
    """

    sources: int
    pixels: int
    least: float
    most: float
    pattern: tuple[tuple[int, int, int], ...] = field(repr=False)


@dataclass(frozen=True)
class Axis:
    """What the two kinds of rows see along one axis.

    Args:
        taps: parts of the taps, one for each remainder modulo the stride that occurs.
        outputs: parts of the outputs, one for each remainder modulo the dilation that occurs.
        live: outputs that see a pixel at all.
        covered: pixels that some output sees.
        uncut: whether every pixel meets all taps of its part.
    """

    taps: tuple[Part, ...]
    outputs: tuple[Part, ...]
    live: int
    covered: int
    uncut: bool


def read_axis(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    """Count along one axis.

    Cost: numpy operations on arrays of outputs x taps, and of sources² for each part.

    >>> edge = read_axis(4, 2, 2, 1, 1)  # outputs at -1, 1, 3: the first and last see one pixel
    >>> edge.taps
    (Part(sources=1, pixels=2, least=2.0, most=2.0), Part(sources=1, pixels=2, least=2.0, most=2.0))
    >>> edge.outputs
    (Part(sources=3, pixels=4, least=1.0, most=2.0),)
    """
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    output, tap = np.arange(count), np.arange(kernel)
    meets = output[:, None] * stride + tap * dilation - padding
    inside = (meets >= 0) & (meets < size)
    taps = _parts(meets.T, inside.T, tap * dilation % stride)
    return Axis(
        taps,
        _parts(meets, inside, output * stride % dilation),
        live=int(inside.any(1).sum()),
        covered=sum(part.pixels for part in taps),
        uncut=int(inside.sum()) == sum(part.sources * part.pixels for part in taps),
    )


def _parts(meets: Ints, inside: NDArray[np.bool_], remainder: Ints) -> tuple[Part, ...]:
    """One part for each remainder among the sources, the rows of `meets`, that meet a pixel."""
    live = inside.any(1)
    return tuple(
        _part(meets[live & (remainder == value)], inside[live & (remainder == value)])
        for value in np.unique(remainder[live])
    )


def _part(meets: Ints, inside: NDArray[np.bool_]) -> Part:
    pixels = np.unique(meets[inside])
    # Within a part a source meets neighbouring pixels only, and both ends move on with the source.
    first = np.searchsorted(pixels, np.where(inside, meets, meets.max()).min(1))
    last = np.searchsorted(pixels, np.where(inside, meets, meets.min()).max(1))
    place = np.arange(len(pixels))
    from_first, to_last = np.searchsorted(last, place), np.searchsorted(first, place, "right") - 1
    pattern = zip(inside.argmax(1).tolist(), inside.sum(1).tolist(), first.tolist(), strict=True)
    return Part(
        len(meets), len(pixels), _fewest(first, last), 1 / _fewest(from_first, to_last),
        tuple(pattern),
    )  # fmt: skip


def _fewest(first: Ints, last: Ints) -> float:
    """Smallest ratio of places met to sources, over all runs of neighbouring sources.

    By Hall's theorem every source can send that much and no more. Runs suffice, because the
    intervals [first, last] move on monotonically.
    """
    fresh = np.zeros_like(first)
    fresh[1:] = last[1:] - np.maximum(first[1:] - 1, last[:-1])
    met = np.cumsum(fresh)
    index = np.arange(len(first))
    length = index[None] - index[:, None] + 1
    union = (last - first + 1 - met)[:, None] + met[None]
    return float(np.where(length > 0, union / np.maximum(length, 1), np.inf).min())
