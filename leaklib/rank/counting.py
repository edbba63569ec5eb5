"""The rank of one layer's equations by counting, without any matrix.

A layer poses [W; K] x = [z; ∇W] about its input x: weight rows and gradient rows. For generic
weights w and pre-activation gradients k the rank depends on sizes alone. In each of the groups,
with C channels and F filters,

    rank K̃     = Σ over parts min(F · taps, pixels),                 K = I ⊗ K̃ over channels
    rank W     = Σ over parts min(F · outputs, C · pixels)
    rank [W;K] = C rank K̃ + min(C (covered − rank K̃), F max(0, live − F)).

Parts are the remainders of the taps modulo the stride, and of the outputs modulo the dilation, for
rows times columns; `live` counts outputs that see a pixel, `covered` pixels that an output sees.
The F² equations subtracted are identities, one for every pair of filters f, g:

    Σ over weights w_f K_g = Σ over outputs k_g W_f.

The last line is refined where K leaves little open, see `_rank_on_null_space`. Each is an upper
bound for generic w and k, and the rank itself wherever `doubts` names no reason against; there it
is told where counting ends. Dead units, pruned gradients and zero filters are not generic: for them
use `singular_rank`.

Source: our derivation; Zhu & Blaschko 2021, section 3.1.2, for what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from leaklib.layer_system.geometry import Geometry
from leaklib.rank.axis import Axis, read_axis
from leaklib.rank.doubts import Block, doubts_about


@dataclass(frozen=True)
class RankCount:
    """Ranks of one layer's equations, for generic weights and gradients.

    Args:
        unknowns: n, entries of the input.
        weight_equations: |z|, rows of W.
        gradient_equations: |w|, rows of K.
        weight_rank: rank of W alone.
        gradient_rank: rank of K alone.
        rank: rank of [W; K].
        doubts: why `rank` or `gradient_rank` may be smaller than counted; empty: they are exact.
        weight_doubts: the same for `weight_rank`.
    """

    unknowns: int
    weight_equations: int
    gradient_equations: int
    weight_rank: int
    gradient_rank: int
    rank: int
    doubts: tuple[str, ...] = ()
    weight_doubts: tuple[str, ...] = ()

    @property
    def deficit(self) -> int:
        """What is missing for a unique solution: RA = rank − n <= 0."""
        return self.rank - self.unknowns

    @property
    def weight_constraints(self) -> int:
        """Virtual constraints that W puts on the next layer's input, p = |z| − rank W.

        z lies in the range of W, so V z = 0 for a basis V of its left null space. At least as many
        where `weight_doubts` names a reason.
        """
        return self.weight_equations - self.weight_rank

    @property
    def joint_constraints(self) -> int:
        """|z| + |w| − rank [W; K]: what W and K together ask of their right-hand side [z; ∇W]."""
        return self.weight_equations + self.gradient_equations - self.rank

    @property
    def reliable(self) -> bool:
        """Whether `rank` and `gradient_rank` are exact for generic weights and gradients."""
        return not self.doubts


def generic_rank(geometry: Geometry) -> RankCount:
    """Rank of [W; K] for generic weights and gradients, from sizes alone.

    Cost: under a millisecond for usual layers, a few for 224 x 224 pixels.

    Args:
        geometry: sizes of the convolution.

    Returns:
        RankCount. Source: our derivation, see the module.

    R-GAP's CNN6 and CNN6-d differ in the filters of their second layer:

    >>> for filters in (36, 20):
    ...     second = Geometry((12, 17, 17), filters, (3, 3), stride=(2, 2), padding=(1, 1))
    ...     print(generic_rank(second).deficit)
    0
    -280
    """
    groups = geometry.groups
    channels, filters = geometry.input_shape[0] // groups, geometry.filters // groups
    vertical, horizontal = (
        read_axis(*along)
        for along in zip(
            geometry.input_shape[1:], geometry.kernel, geometry.stride, geometry.padding,
            geometry.dilation, strict=True,
        )
    )  # fmt: skip
    block = sum(
        min(filters * a.sources * b.sources, a.pixels * b.pixels)
        for a in vertical.taps
        for b in horizontal.taps
    )
    weight = sum(
        min(filters * a.sources * b.sources, channels * a.pixels * b.pixels)
        for a in vertical.outputs
        for b in horizontal.outputs
    )
    joint = channels * block + _rank_on_null_space(channels, filters, vertical, horizontal)
    doubts, weight_doubts = doubts_about(
        Block(geometry, channels, filters, vertical, horizontal, block, weight)
    )
    return RankCount(
        unknowns=geometry.unknowns,
        weight_equations=geometry.filters * geometry.positions,
        gradient_equations=geometry.filters * channels * geometry.kernel[0] * geometry.kernel[1],
        weight_rank=groups * weight,
        gradient_rank=groups * channels * block,
        rank=groups * joint,
        doubts=doubts,
        weight_doubts=weight_doubts,
    )


def _rank_on_null_space(channels: int, filters: int, vertical: Axis, horizontal: Axis) -> int:
    """Rank of W (I ⊗ N), N the null space of K̃: what the weight rows add.

    Of a part with T taps K leaves ν = pixels − F·T dimensions open, the same ones in each of the C
    channels: C Σ ν in all. For every filter W maps them to T shifts of them, orthogonal to the F
    gradients k: a space of at most S = min(live − F, Σ T ν) dimensions, to which parts of one
    pattern contribute once. Set some parts apart, with T taps in all: they reach only C·T
    directions of the filters, and in the others there is only what the rest maps to. So

        rank <= min(F, C T) (live − F) + max(0, F − C T) S_rest

    for each choice, which is F (live − F) unless S is less; the parts with fewest taps go first.
    """
    beyond = max(0, vertical.live * horizontal.live - filters)
    parts = sorted(
        product(vertical.taps, horizontal.taps),
        key=lambda pair: pair[0].sources * pair[1].sources,
    )
    taps = [a.sources * b.sources for a, b in parts]
    free = [
        max(0, a.pixels * b.pixels - filters * t) for (a, b), t in zip(parts, taps, strict=True)
    ]
    rank = channels * sum(free)
    for first in range(len(parts)):
        rest = {
            (a.pattern, b.pattern): t * v
            for (a, b), t, v in zip(parts[first:], taps[first:], free[first:], strict=True)
        }
        shifts = min(beyond, sum(rest.values()))
        reached = min(filters, channels * sum(taps[:first]))
        rank = min(rank, reached * beyond + (filters - reached) * shifts)
    return rank


def naive_deficit(geometry: Geometry) -> int:
    """|z| + |w| − n, what counting equations against unknowns says; positive: "enough" equations.

    It takes every equation for independent, so it promises too much: for CNN6-d's second layer 312
    equations to spare, where 280 are missing. Here to show that; the sign is that of a deficit.

    >>> naive_deficit(Geometry((12, 17, 17), 20, (3, 3), stride=(2, 2), padding=(1, 1)))
    312
    """
    weights = geometry.filters * geometry.input_shape[0] // geometry.groups
    weights *= geometry.kernel[0] * geometry.kernel[1]
    return geometry.filters * geometry.positions + weights - geometry.unknowns
