"""Ranks of what is no plain convolution: residual blocks and average pooling.

A residual block is s = W₂ a + h(x) with a = σ(W₁ x). Once it is known on which side of the kink
each entry of a lies, a = D W₁ x up to constants, D = σ', and its equations about x are

    [W₂ D W₁ + H;  K₂ D W₁;  K₁;  K_h] x.

With the identity for h the first is square, I + W₂ D W₁, and invertible for all weights but a set
of measure zero: the deficit is 0 whatever the convolutions are. A convolution for h has as many
rows as it has outputs, and no formula that counts the rank of the four together is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leaklib.chain import ConvStage, PoolStage, ResidualStage
from leaklib.layer_system.block import gradient_block
from leaklib.layer_system.published import weight_matrix
from leaklib.rank.singular import TOLERANCE, check_size


def residual_rank(
    stage: ResidualStage, *, generator: torch.Generator, tolerance: float = TOLERANCE
) -> int:
    """Rank of a residual block's equations about its input x, kinks known.

    Singular values of the dense matrix above, its four kinds of rows brought to one length, for the
    block's weights, drawn pre-activations and a drawn gradient at its output. The rank of the
    equations about (a, x) together is larger by the entries of a.

    Args:
        stage: the block.
        generator: of the draws.
        tolerance: what counts, relative to the largest singular value.

    Returns:
        rank. Cost: a singular value decomposition with one column an entry of x.

    Raises:
        ValueError: the matrix would be too large; see `check_size`.

    Source: our derivation; Zhu & Blaschko 2021 analyse skip connections without a formula.
    """
    first, second, shortcut = stage.first, stage.second, stage.shortcut
    unknowns = first.geometry.unknowns
    inside, outside = second.geometry.unknowns, second.geometry.filters * second.geometry.positions
    kernels = sum(part.weight.numel() for part in (first, second, shortcut) if part is not None)
    check_size(max(outside + kernels, inside), unknowns)
    check_size(max(outside, second.weight.numel()), inside)
    draw = torch.randn(first.output_shape, generator=generator, dtype=torch.float64)
    slope = stage.activation.inverse.slope(stage.activation.forward(draw[None]))[0].cpu()
    grad = torch.randn(second.output_shape, generator=generator, dtype=torch.float64)
    inner = slope.flatten()[:, None] * _weight_rows(first)  # D W₁
    outer = _weight_rows(second)
    inner_grad = (grad.flatten() @ outer * slope.flatten()).view(first.output_shape)
    across = (
        torch.eye(unknowns, dtype=torch.float64) if shortcut is None else _weight_rows(shortcut)
    )
    kinds = [
        outer @ inner + across,
        _gradient_rows(second, grad) @ inner,
        _gradient_rows(first, inner_grad),
    ]
    if shortcut is not None:
        kinds.append(_gradient_rows(shortcut, grad))
    rows = torch.cat([kind / kind.norm().clamp_min(1e-300) * len(kind) ** 0.5 for kind in kinds])
    values = torch.linalg.svdvals(rows)
    return int((values > tolerance * values[0]).sum())


def pooling_rank(stage: PoolStage) -> int:
    """Rank of average pooling on its own, P x = y, which has no gradient rows.

    Pooling averages rows and columns one after the other and each channel alone, so
    rank P = channels · rank P_vertical · rank P_horizontal. Cost: two small decompositions.

    >>> from torch import nn
    >>> pooling_rank(PoolStage("pool", nn.AvgPool2d(2), (3, 4, 4), (3, 2, 2)))
    12
    """
    channels, height, width = stage.input_shape
    ranks = []
    for size, shape in ((height, (height, 1, height, 1)), (width, (width, 1, 1, width))):
        lines = torch.eye(size, dtype=torch.float64).reshape(shape)
        pooled = stage.forward(lines.expand(size, 1, height, width)).flatten(1)
        ranks.append(int(torch.linalg.matrix_rank(pooled, rtol=1e-10)))
    return channels * ranks[0] * ranks[1]


def _weight_rows(stage: ConvStage) -> Tensor:
    return weight_matrix(stage.geometry, stage.weight.cpu())


def _gradient_rows(stage: ConvStage, grad: Tensor) -> Tensor:
    """K as a dense matrix (weights, unknowns)."""
    geometry = stage.geometry
    block = gradient_block(geometry, grad[None])[0]  # (groups, filters·taps, pixels)
    channels = geometry.weight_shape[1]
    identity = torch.eye(channels, dtype=block.dtype)
    return torch.block_diag(*(torch.kron(identity, part) for part in block))
