"""The hybrid: a layer short of equations gets more from the layer before it.

A deficient layer i leaves x_i = x_min + N y open, N its null space. But x_i = σ(W_{i−1}x_{i−1} + b)
lies on a manifold. With V a basis of the left null space of W_{i−1},

    V (σ⁻¹(x_min + N y) − b) = 0

are equations for y, R-GAP's virtual constraints; Levenberg-Marquardt solves them where there are as
many as unknowns. Where there are not, the gradient of layer i−1 is matched too, see `null_space`.

Source: Zhu & Blaschko 2021 for virtual constraints, as we remember the paper; solving them is ours,
in place of its H-GAP, which has no public code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from leaklib.attacks.recursive.null_space import match_in_null_space
from leaklib.attacks.recursive.upstream import Upstream
from leaklib.layer_system.operators import LayerSystem, transposed_weight_rows
from leaklib.layer_system.published import weight_matrix
from leaklib.layer_system.split import solve_split
from leaklib.rank.counting import generic_rank

_STEPS = 60
_RANK = 1e-10


def fill_deficit(
    upstream: Upstream,
    system: LayerSystem,
    preactivation: Tensor,
    weight_grad: Tensor,
    grads: Mapping[str, Tensor],
    victims: Tensor,
) -> tuple[Tensor, Tensor]:
    """Inputs of a deficient layer that agree with the layer before it.

    Args:
        upstream: the layer before it.
        system: the deficient layer.
        preactivation: z without bias (rows, filters, height, width).
        weight_grad: ∂L/∂W (rows, *weight shape).
        grads: all gradients by parameter name (victims, *shape).
        victims: whose row it is (rows,).

    Returns:
        x (rows, channels, height, width), and the steps taken (rows,); 0 where even both kinds of
        equations are too few, and x is then of minimum norm. Cost: a dense null space a row, and a
        QR decomposition of the layer before once.
    """
    basis = left_null_space(weight_matrix(upstream.conv.geometry, upstream.conv.weight))
    found, counts = [], []
    for row in range(len(preactivation)):
        k = system.preactivation_grad[row]
        part = solve_split(
            system.geometry, system.weight, preactivation[row], k, weight_grad[row],
            null_space=True,
        )  # fmt: skip
        assert part.null_space is not None
        null = part.null_space
        missing = null.shape[1]
        if basis.shape[0] >= missing:
            x, steps = _virtual(upstream, basis, part.x, null)
        elif generic_rank(upstream.conv.geometry).joint_constraints >= missing:
            at_x = transposed_weight_rows(system.geometry, system.weight, k[None])[0]
            grad = grads[f"{upstream.conv.name}.weight"][victims[row]]
            x, steps = match_in_null_space(upstream, part.x, null, at_x, grad)
        else:
            x, steps = part.x, 0
        found.append(x)
        counts.append(steps)
    return torch.stack(found), victims.new_tensor(counts)


def left_null_space(matrix: Tensor) -> Tensor:
    """Orthonormal rows V with V W = 0, (rows − rank, rows).

    >>> left_null_space(torch.tensor([[2.0], [0.0]], dtype=torch.float64)).abs().tolist()
    [[0.0, 1.0]]
    """
    rows, columns = matrix.shape
    if rows > columns:
        q, r = torch.linalg.qr(matrix, mode="complete")
        diagonal = r.diagonal().abs()
        if float(diagonal.amin()) > _RANK * float(diagonal.amax()):
            return q[:, columns:].T
    u, values, _ = torch.linalg.svd(matrix, full_matrices=True)
    rank = int((values > _RANK * values[0]).sum())
    return u[:, rank:].T


def _virtual(upstream: Upstream, basis: Tensor, x: Tensor, null: Tensor) -> tuple[Tensor, int]:
    """Levenberg-Marquardt on V (σ⁻¹(x + N y) − b) = 0 from y = 0."""

    def residual(y: Tensor) -> tuple[Tensor, Tensor]:
        at = x + (null @ y).view_as(x)
        z, stretch = upstream.preactivation(at)
        return basis @ z.flatten(), stretch.flatten()

    y = x.new_zeros(null.shape[1])
    wrong, stretch = residual(y)
    damping, steps = 1e-3, 0
    for _ in range(_STEPS):
        jac = basis @ (stretch[:, None] * null)
        gram, slope = jac.T @ jac, jac.T @ wrong
        size = float(gram.diagonal().amax())
        improved = False
        while damping < 1e12:
            damped = gram + damping * size * torch.eye(len(y), dtype=y.dtype, device=y.device)
            move = torch.linalg.solve(damped, slope)
            fresh, fresh_stretch = residual(y - move)
            if float(fresh.norm()) < float(wrong.norm()):
                improved = True
                break
            damping *= 8
        if not improved:
            break
        shrink = float(fresh.norm()) / float(wrong.norm())
        y, wrong, stretch, steps = y - move, fresh, fresh_stretch, steps + 1
        damping = max(damping / 30, 1e-15)
        if shrink > 0.999 or float(move.norm()) <= 1e-14 * float(y.norm()):
            break
    return x + (null @ y).view_as(x), steps
