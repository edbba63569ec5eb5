"""Where counting the rank of a layer ends.

The counts of `generic_rank` are upper bounds, and they are the rank unless a doubt is raised. Of
some 36,000 drawn layers of up to 250 unknowns without a doubt, and not settled by W or K alone, all
had the counted rank by exact elimination. A doubt is no proof against a count: of the doubted small
layers about one in thirty had a smaller rank, by a few equations. No layer of CNN6, LeNet, VGG,
ResNet or MobileNet at its usual sizes is doubted. The reasons:

* Edges. Where padding leaves some outputs or taps few pixels, these have more equations than
  pixels, and equations are lost that the total does not miss. A flow decides whether that happens
  (Hall's theorem). 2x2 kernels with stride 2 and padding 1 on 6x3 pixels, 2 channels, 5 filters:
  rank W is 30, counted 36.
* Syzygies. Filters are polynomials in two variables. If there are only a few more filters than
  channels, and the output is no larger than the kernel, products of them cancel: k₁k₂ − k₂k₁ = 0
  is a combination of gradient rows. 3x3 kernels on 5x5 pixels, 3 filters: rank K̃ is 24, counted
  25. Two such polynomials also have common zeros, and with every zero goes a picture that no row
  sees: one channel of 8x8 pixels, two 2x2 kernels: rank W is 62, counted 64.
* Small maps, full padding, or padding with a large stride, where parts of the picture meet
  different taps. 3 channels of 3x3 pixels, one 2x2 kernel, padding 1: rank 26, counted 27.
* Dilation, where W falls apart into lattices that K ties together, near the border between too few
  and enough equations.
* Unusual layers, whose counts were found wrong too often to tell why: padding of more than half the
  kernel's reach, or both stride and dilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import comb

from leaklib.layer_system.geometry import Geometry
from leaklib.rank.axis import Axis, Part

# Flows are ratios of small integers, compared with some room for rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Block:
    """One group of a convolution: its sizes, both axes, and what was counted.

    Args:
        geometry: of the whole layer.
        channels: of the group.
        filters: of the group.
        vertical: rows.
        horizontal: columns.
        block_rank: rank of K̃.
        weight_rank: rank of the group's W.
    """

    geometry: Geometry
    channels: int
    filters: int
    vertical: Axis
    horizontal: Axis
    block_rank: int
    weight_rank: int

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Rows and columns."""
        return self.vertical, self.horizontal

    @property
    def covered(self) -> int:
        """Pixels that an output sees."""
        return self.vertical.covered * self.horizontal.covered

    @property
    def live(self) -> int:
        """Outputs that see a pixel."""
        return self.vertical.live * self.horizontal.live

    @property
    def reach(self) -> tuple[int, int]:
        """Distance of the first and last tap."""
        dilation, kernel = self.geometry.dilation, self.geometry.kernel
        return dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)

    @property
    def small(self) -> bool:
        """Whether some axis has hardly more outputs than the kernel is long."""
        return any(
            axis.live <= max(3, reach + 1)
            for axis, reach in zip(self.axes, self.reach, strict=True)
        )

    @property
    def dilated(self) -> int:
        """Number of lattices that the outputs fall into; 1 without dilation."""
        return self.geometry.dilation[0] * self.geometry.dilation[1]

    @property
    def phases(self) -> int:
        """Channels as the strided kernel sees them: channels times the parts of the taps."""
        return self.channels * len(self.vertical.taps) * len(self.horizontal.taps)


def doubts_about(block: Block) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reasons why the rank of [W; K] or of K, and that of W, may be below what was counted."""
    common = set(_unusual(block))
    gradient = common | set(_gradient(block))
    weight = common | set(_weight(block))
    joint = set(gradient)
    injective = block.weight_rank == block.channels * block.covered and not weight
    if block.block_rank < block.covered and not injective:
        joint |= set(_both(block, weight))
    return tuple(sorted(joint)), tuple(sorted(weight))


def _unusual(block: Block) -> Iterator[str]:
    geometry = block.geometry
    for reach, padding, stride, dilation in zip(
        block.reach, geometry.padding, geometry.stride, geometry.dilation, strict=True
    ):
        if 2 * padding > reach + 1:
            yield "padding is more than half the kernel's reach"
        if stride > 1 and dilation > 1:
            yield "stride and dilation are both above 1"


def _gradient(block: Block) -> Iterator[str]:
    """About K: sources are taps, each with one equation a filter; a pixel has room for one."""
    filters, dilated = block.filters, block.dilated
    down, right = block.geometry.dilation
    # outputs of one lattice: the degree of the polynomial k_f, plus 1
    rows, columns = -(-block.vertical.live // down), -(-block.horizontal.live // right)
    plane = block.vertical.live > 1 and block.horizontal.live > 1
    for a, b in product(block.vertical.taps, block.horizontal.taps):
        pixels, equations = a.pixels * b.pixels, filters * a.sources * b.sources
        if not _flows(filters, a, b, 1):
            yield "taps at the edge meet too few pixels"
        if dilated > 1 and block.small and equations < 2 * pixels:
            yield "dilation on a small map"
        if not plane or filters <= dilated or equations > 1.5 * pixels:
            continue
        products = max(0, a.sources - dilated * (rows - 1))
        products *= max(0, b.sources - dilated * (columns - 1))
        if equations - comb(filters, dilated + 1) * products < min(equations, pixels):
            yield "filters commute on a map no larger than the kernel"
    saturated = any(
        filters * a.sources * b.sources >= a.pixels * b.pixels
        for a, b in product(block.vertical.taps, block.horizontal.taps)
    )
    if plane and saturated and filters == dilated + 1 and not any(block.geometry.padding):
        yield "two filters have common zeros"


def _weight(block: Block) -> Iterator[str]:
    """About W: sources are outputs, with one equation a filter; a pixel has room for C."""
    geometry, filters, phases = block.geometry, block.filters, block.phases
    plane = min(geometry.kernel) > 1
    length, width = (
        -(-taps // stride) - 1
        for taps, stride in zip(geometry.kernel, geometry.stride, strict=True)
    )
    if plane and filters == phases + 1:
        yield "one filter more than channels"
    if plane and phases == filters + 1 and _padded_full(block):
        yield "one channel more than filters, and full padding"
    for a, b in product(block.vertical.outputs, block.horizontal.outputs):
        equations = filters * a.sources * b.sources
        room = block.channels * a.pixels * b.pixels
        if not _flows(filters, a, b, block.channels):
            yield "outputs at the edge see too few pixels"
        if not plane or filters <= phases or equations > 1.5 * room:
            continue
        products = max(0, a.sources - phases * length) * max(0, b.sources - phases * width)
        if equations - comb(filters, phases + 1) * products < min(equations, room):
            yield "filters commute"


def _both(block: Block, weight: set[str]) -> Iterator[str]:
    """About W on the null space of K, where that decides the rank."""
    geometry = block.geometry
    harmless = {"one filter more than channels", "filters commute"}
    yield from weight if block.dilated > 1 else weight - harmless
    if block.small:
        yield "small map"
    if any(s >= 3 and p for s, p in zip(geometry.stride, geometry.padding, strict=True)):
        yield "padding with a stride of 3 or more"
    if any(r and p >= r for r, p in zip(block.reach, geometry.padding, strict=True)):
        yield "full padding"
    if block.dilated > 1:
        null = block.channels * (block.covered - block.block_rank)
        extra = block.filters * max(0, block.live - block.filters)
        if null < 2 * extra and extra < 2 * null:
            yield "dilation, and about as many equations as unknowns"
        if block.weight_rank < min(block.filters * block.live, block.channels * block.covered):
            yield "dilation, and lattices with too many and with too few equations"


def _flows(filters: int, a: Part, b: Part, room: int) -> bool:
    """Whether all equations fit their pixels, or all pixels can be filled: no edge spoils it.

    The product of a flow along rows and one along columns is a flow in the plane.
    """
    spare = room * a.least * b.least * (1 + _ROUNDING)
    needed = room * a.most * b.most * (1 - _ROUNDING)
    return filters <= spare or filters >= needed


def _padded_full(block: Block) -> bool:
    """Whether every pixel meets all its taps; with dilation, on some lattice perhaps."""
    return all(
        axis.uncut or (dilation > 1 and padding > 0)
        for axis, padding, dilation in zip(
            block.axes, block.geometry.padding, block.geometry.dilation, strict=True
        )
    )
