"""Rank analysis of a network: what a recursive attack lacks at each layer, before any attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pandas as pd
import torch
from torch import nn

from leaklib.chain import (
    ConvStage,
    ElementwiseStage,
    LinearStage,
    PoolStage,
    ResidualStage,
    Stage,
    read_chain,
)
from leaklib.rank.blocks import pooling_rank, residual_rank
from leaklib.rank.counting import generic_rank
from leaklib.rank.index import security_index
from leaklib.rank.singular import singular_rank, singular_weight_rank

Method = Literal["counting", "singular values"]


@dataclass(frozen=True)
class LayerRank:
    """One layer of a network and the rank of its equations.

    Args:
        name: module path.
        kind: "conv", "conv + pool" (solved as one), "pool", "residual" or "linear".
        input_shape: of the layer.
        unknowns: n, entries of its input.
        rank: of its equations about the input; of [W; K] for a convolution.
        virtual: constraints p that the weights of the layer before put on the input.
        joint: constraints that its weights and gradients together put on it.
        exact: False where counting is only known to give an upper bound.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    unknowns: int
    rank: int
    virtual: int = 0
    joint: int = 0
    exact: bool = True

    @property
    def deficit(self) -> int:
        """What is missing for a unique solution: RA = rank − n <= 0."""
        return self.rank - self.unknowns

    @property
    def filled_by(self) -> str:
        """Which constraints of the layer before are at least as many as what is missing.

        "" where nothing is missing, "weights", "weights and gradients", or "nothing". Enough
        constraints make the input unique, if they are independent, but they are not linear in it.
        """
        if not self.deficit:
            return ""
        if self.virtual >= -self.deficit:
            return "weights"
        return "weights and gradients" if self.joint >= -self.deficit else "nothing"


@dataclass(frozen=True)
class RankReport:
    """Rank analysis of one network.

    Args:
        layers: from the image to the output.
        deficits: RA_i of the layers that the index counts, the one next to the image first.
        unknowns: n_i of the same layers.
    """

    layers: tuple[LayerRank, ...]
    deficits: tuple[int, ...]
    unknowns: tuple[int, ...]

    @property
    def index(self) -> float:
        """The security index c(M) <= 0 of R-GAP; see `security_index`."""
        return security_index(self.deficits)

    @property
    def normalised_index(self) -> float:
        """The index of the relative deficits RA_i/n_i."""
        return security_index(self.deficits, unknowns=self.unknowns)

    def table(self) -> pd.DataFrame:
        """One row a layer, the attributes of `LayerRank` with deficit and filled_by as columns."""
        return pd.DataFrame(
            {
                "layer": layer.name,
                "kind": layer.kind,
                "input": "x".join(map(str, layer.input_shape)),
                "unknowns": layer.unknowns,
                "rank": layer.rank,
                "deficit": layer.deficit,
                "virtual": layer.virtual,
                "joint": layer.joint,
                "filled_by": layer.filled_by,
                "exact": layer.exact,
            }
            for layer in self.layers
        )


def rank_analysis(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    method: Method = "counting",
    seed: int = 0,
) -> RankReport:
    """Rank of every layer's equations, and the index of the network.

    A fully connected layer gives its input by its gradient alone. A residual block with the
    identity as its shortcut has deficit 0. Average pooling right behind a convolution is part of
    its equations, elsewhere it has only P x = y. No formula counts a convolution with pooling, or a
    block with a convolution as its shortcut: they are decomposed by either method. The index counts
    convolutions; a residual block counts for two, with its deficit at the first, so that cutting
    the shortcut leaves their number as it is.

    Args:
        model: a chain, see `leaklib.chain.read_chain`, in eval mode.
        input_shape: (channels, height, width) of an image.
        method: "counting" for generic weights and gradients, by sizes alone; "singular values" for
            the model's weights and drawn gradients. Constraints of the layer before are counted
            where nothing is missing.
        seed: of what is drawn: gradients, and which units of a ReLU are active (each with 1/2).

    Returns:
        RankReport. Cost of counting: milliseconds, whatever the size of the image; of singular
        values: see `singular_rank`, about a minute for CNN6.

    Raises:
        ValueError: a layer that has no place in a chain; an unknown method; a ReLU behind a
            convolution whose rank is to be counted; matrices too large to decompose.

    >>> from leaklib.models import build
    >>> report = rank_analysis(build("cnn6-d"), (3, 32, 32))
    >>> report.deficits, round(report.index, 2), report.layers[1].filled_by
    ((0, -280, 0, 0, 0, 0), -233.33, 'weights')
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {get_args(Method)}, got {method!r}")
    stages = read_chain(model, input_shape)
    generator = torch.Generator().manual_seed(seed)
    layers: list[LayerRank] = []
    deficits: list[int] = []
    unknowns: list[int] = []
    before: tuple[ConvStage, int] | None = None  # the convolution before, and its rank
    for place, stage in enumerate(stages):
        if isinstance(stage, ElementwiseStage):
            # where a ReLU is zero its input is not known, so it passes no constraint on
            before = None if stage.inverse.known is not None else before
        elif isinstance(stage, ConvStage):
            layer = _convolution(stages, place, method, generator)
            if before is not None:
                layer = _constrained(layer, *before, method)
            layers.append(layer)
            deficits.append(layer.deficit)
            unknowns.append(layer.unknowns)
            before = stage, layer.rank
        elif isinstance(stage, ResidualStage):
            layer = _residual(stage, generator)
            layers.append(layer)
            deficits += [layer.deficit, 0]
            unknowns += [layer.unknowns, stage.second.geometry.unknowns]
            before = None
        elif isinstance(stage, LinearStage):
            entries = stage.input_shape[0]
            layers.append(LayerRank(stage.name, "linear", stage.input_shape, entries, entries))
            before = None
        elif isinstance(stage, PoolStage):
            if not isinstance(stages[place - 1] if place else None, ConvStage):
                entries = _entries(stage.input_shape)
                layers.append(
                    LayerRank(stage.name, "pool", stage.input_shape, entries, pooling_rank(stage))
                )
            before = None
    return RankReport(tuple(layers), tuple(deficits), tuple(unknowns))


def _convolution(
    stages: tuple[Stage, ...], place: int, method: Method, generator: torch.Generator
) -> LayerRank:
    """A convolution, with the pooling or the ReLU behind it."""
    stage = stages[place]
    assert isinstance(stage, ConvStage)
    rest = stages[place + 1 :]
    pool = rest[0] if rest and isinstance(rest[0], PoolStage) else None
    hidden = _hidden(rest)
    if method == "counting" and hidden is not None:
        raise ValueError(
            f"expected an invertible activation behind {stage.name!r} to count, got {hidden!r}, "
            'whose zeros hide z; use method="singular values", or LeakyReLU'
        )
    kind = "conv" if pool is None else "conv + pool"
    shape, entries = stage.input_shape, stage.geometry.unknowns
    if method == "counting" and pool is None:
        count = generic_rank(stage.geometry)
        return LayerRank(stage.name, kind, shape, entries, count.rank, exact=count.reliable)
    grad = torch.randn(1, *stage.output_shape, generator=generator, dtype=torch.float64)
    known = None
    if pool is not None:
        grad = pool.transposed(torch.randn(
            1, *pool.output_shape, generator=generator, dtype=torch.float64
        ))  # fmt: skip
    elif hidden is not None:
        known = torch.rand(grad.shape, generator=generator, dtype=torch.float64) < 0.5
        grad = grad * known
    found = singular_rank(stage.geometry, stage.weight.cpu(), grad, known=known, pool=pool)
    return LayerRank(stage.name, kind, shape, entries, int(found.rank[0]))


def _hidden(rest: Sequence[Stage]) -> str | None:
    """The activation that hides some of z, among those right behind a convolution."""
    for stage in rest:
        if not isinstance(stage, ElementwiseStage):
            return None
        if stage.inverse.known is not None:
            return stage.inverse.name
    return None


def _constrained(layer: LayerRank, before: ConvStage, rank: int, method: Method) -> LayerRank:
    """What the convolution before asks of the input of this layer."""
    count = generic_rank(before.geometry)
    if method == "counting" or not layer.deficit:
        return replace(layer, virtual=count.weight_constraints, joint=count.joint_constraints)
    weight_rank = singular_weight_rank(before.geometry, before.weight.cpu())
    return replace(
        layer,
        virtual=count.weight_equations - weight_rank,
        joint=count.weight_equations + count.gradient_equations - rank,
    )


def _residual(stage: ResidualStage, generator: torch.Generator) -> LayerRank:
    unknowns = stage.first.geometry.unknowns
    rank = unknowns if stage.shortcut is None else residual_rank(stage, generator=generator)
    return LayerRank(stage.name, "residual", stage.input_shape, unknowns, rank)


def _entries(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
