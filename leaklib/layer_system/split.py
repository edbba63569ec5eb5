"""Gradient rows first: K x = ∇W fixes part of x, the weight rows W x = z the rest.

    x = K⁺∇W + (I ⊗ N) y,   min ‖W (I ⊗ N) y − (z − W K⁺∇W)‖,

with N a basis of the null space of the small block K̃ (K = I ⊗ K̃). The two kinds of rows never mix,
so their scales do not matter: ranks are exact, and null spaces come out. Dense, one victim at a
time: for small layers. Source: our derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.layer_system.block import gradient_block, grouped_weight_grad
from leaklib.layer_system.geometry import Geometry, unfold

# Singular values of the block below this part of the largest count as zero: between them and the
# kept ones lie ten decades in every network measured.
CUTOFF = 1e-10
# The same for the eigenvalues of the normal matrix of the second step.
_GRAM_CUTOFF = 1e-12


@dataclass(frozen=True)
class SplitSolution:
    """One victim's layer input.

    Args:
        x: (channels, height, width), of minimum norm where it is not unique.
        null_space: orthonormal columns (unknowns, deficit), or None where not asked for.
        rank: of [W; K].
        condition: of the worse of the two steps.
    """

    x: Tensor
    null_space: Tensor | None
    rank: int
    condition: float


def solve_split(
    geometry: Geometry,
    weight: Tensor,
    preactivation: Tensor,
    preactivation_grad: Tensor,
    weight_grad: Tensor,
    *,
    known: Tensor | None = None,
    truncation: float = CUTOFF,
    null_space: bool = False,
) -> SplitSolution:
    """Solve one victim's layer, gradient rows first.

    Args:
        geometry: sizes of the layer.
        weight: (filters, channels per group, kernel height, kernel width).
        preactivation: z without bias (filters, height, width).
        preactivation_grad: k, of the same shape.
        weight_grad: ∂L/∂W, shaped as the weight.
        known: which entries of z are known; None: all.
        truncation: singular values of the block below this part of the largest are left to the
            weight rows. Larger values withstand noise in the gradient better.
        null_space: also return the directions that no row sees.

    Returns:
        SplitSolution. Cost: a singular value decomposition of the block and a Cholesky (with
        `null_space` an eigenvalue) decomposition of a matrix of at most `unknowns` rows.
    """
    block = gradient_block(geometry, preactivation_grad[None])[0]
    grads = grouped_weight_grad(geometry, weight_grad[None])[0]
    parts = [_minimum_norm(b, g, truncation) for b, g in zip(block, grads, strict=True)]
    channels = geometry.input_shape[0] // geometry.groups
    x = torch.stack([part for part, _, _ in parts]).mT.reshape(geometry.input_shape)
    seen = unfold(geometry, x[None])[0]  # (groups, channels·taps, positions)
    weights = weight.reshape(geometry.groups, -1, channels, weight[0, 0].numel())
    rest = preactivation.reshape(geometry.groups, -1) - (weights.flatten(2) @ seen).flatten(1)
    mask = None if known is None else known.reshape(geometry.groups, -1).to(rest.dtype)
    rank, condition, spaces, moved = 0, 1.0, [], []
    for group, (_, basis, worst) in enumerate(parts):
        pixels, nulls = basis.shape
        mixed = null_rows(geometry, weights[group], basis)
        if mask is not None:
            mixed, rest[group] = mixed * mask[group, :, None], rest[group] * mask[group]
        y, space, second = _normal_solve(mixed, rest[group], null_space)
        moved.append(y.view(channels, nulls) @ basis.T)
        lost = 0 if space is None else space.shape[1]
        rank += channels * pixels - lost
        condition = max(condition, worst, second)
        if space is not None:
            spread = torch.einsum("pn,cnq->cpq", basis, space.view(channels, nulls, lost))
            whole = x.new_zeros(geometry.groups, channels, pixels, lost)
            whole[group] = spread
            spaces.append(whole.view(geometry.unknowns, lost))
    x = x + torch.stack(moved).view(geometry.input_shape)
    return SplitSolution(x, torch.cat(spaces, dim=1) if spaces else None, rank, condition)


def null_rows(geometry: Geometry, weight: Tensor, basis: Tensor) -> Tensor:
    """W (I ⊗ N) of one group: what the weight rows see of the directions that K̃ does not.

    Args:
        geometry: sizes of the layer.
        weight: the group's kernel (filters, channels, taps).
        basis: N (pixels, nulls).

    Returns:
        (filters · positions, channels · nulls).
    """
    single = Geometry(
        (1, *geometry.input_shape[1:]), 1, geometry.kernel, geometry.stride, geometry.padding,
        geometry.dilation,
    )  # fmt: skip
    images = basis.T.reshape(-1, 1, *geometry.input_shape[1:])
    seen = unfold(single, images)[:, 0]  # (nulls, taps, positions)
    return torch.einsum("fct,ntl->flcn", weight, seen).flatten(2).flatten(0, 1)


def _minimum_norm(block: Tensor, grads: Tensor, truncation: float) -> tuple[Tensor, Tensor, float]:
    """K̃⁺g for every channel, a basis of the null space of K̃, the condition of what was kept."""
    u, values, vh = torch.linalg.svd(block, full_matrices=True)
    kept = int((values > truncation * values[0]).sum()) if values[0] > 0 else 0
    inverse = (u[:, :kept].T @ grads) / values[:kept, None]
    condition = float(values[0] / values[kept - 1]) if kept else 1.0
    return vh[:kept].T @ inverse, vh[kept:].T, condition


def _normal_solve(
    matrix: Tensor, target: Tensor, null_space: bool
) -> tuple[Tensor, Tensor | None, float]:
    """Least squares by the normal equations, refined twice; minimum norm and null space."""
    if not matrix.shape[1]:
        return matrix.new_zeros(0), matrix.new_zeros(0, 0) if null_space else None, 1.0
    gram = matrix.T @ matrix
    factor, failed = torch.linalg.cholesky_ex(gram)
    smallest = factor.diagonal().amin() ** 2
    if null_space or failed or smallest < _GRAM_CUTOFF * gram.diagonal().amax():
        values, vectors = torch.linalg.eigh(gram)
        kept = values > _GRAM_CUTOFF * values[-1].clamp_min(1e-300)
        space, good = vectors[:, ~kept], vectors[:, kept]

        def solve(v: Tensor) -> Tensor:
            return good @ ((good.T @ v) / values[kept])

        condition = float((values[-1] / values[kept][0]).sqrt()) if bool(kept.any()) else 1.0
    else:
        space = matrix.new_zeros(matrix.shape[1], 0)
        diagonal = factor.diagonal()
        condition = float(diagonal.amax() / diagonal.amin())  # a lower bound, and cheap

        def solve(v: Tensor) -> Tensor:
            return torch.cholesky_solve(v[:, None], factor)[:, 0]

    y = solve(matrix.T @ target)
    for _ in range(2):
        y = y + solve(matrix.T @ (target - matrix @ y))
    return y, space, condition
