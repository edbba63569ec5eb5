"""Batched least squares by conjugate gradients on the normal equations (CGLS), matrix-free.

Every victim has its own step sizes and stops by itself. Started from zero, the iterates stay in the
row space, so a deficient system gets its solution of minimum norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

Rows = tuple[Tensor, ...]


@dataclass(frozen=True)
class LeastSquares:
    """What `least_squares` found.

    Args:
        x: (victims, *unknowns).
        iterations: products with the operator and its adjoint, (victims,).
        condition: σ_max/σ_min as far as the search saw it, (victims,); null directions excluded.
        converged: whether the tolerance was met, (victims,).
    """

    x: Tensor
    iterations: Tensor
    condition: Tensor
    converged: Tensor


def least_squares(
    rows: Callable[[Tensor], Rows],
    adjoint: Callable[[Rows], Tensor],
    target: Rows,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-13,
    max_iterations: int = 4_000,
) -> LeastSquares:
    """Solve min ‖A x − b‖ for many victims, of minimum norm if that is not unique.

    Stops a victim when ‖Aᵀ(b − A x)‖ ≤ tolerance ‖Aᵀ b‖, or when as many iterations as there are
    unknowns, and at least 500, brought nothing: rounding then rules. Plateaus of 200 are common
    where the condition is 1000. Source: Hestenes & Stiefel 1952; Björck 1996, section 7.4.

    Args:
        rows: x (victims, *unknowns) -> A x, a tuple of tensors with a leading victim axis.
        adjoint: the transpose of `rows`.
        target: b, shaped as A x.
        start: x to start from, whose null component is kept; None is zero.
        tolerance: relative, of the normal residual.
        max_iterations: bound on the products with A and with Aᵀ.

    Returns:
        LeastSquares. Cost: one product with A and one with Aᵀ an iteration.

    >>> A = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    >>> found = least_squares(lambda x: (x @ A.T,), lambda r: r[0] @ A,
    ...                       (torch.tensor([[4.0, 3.0, 5.0]], dtype=torch.float64),))
    >>> found.x.tolist(), found.iterations.tolist()
    ([[2.0, 3.0]], [2])
    """
    slope = adjoint(target)
    first = _square(slope)
    x = torch.zeros_like(slope) if start is None else start.clone()
    residual = target if start is None else _minus(target, rows(x))
    slope = slope if start is None else adjoint(residual)
    direction, gamma = slope.clone(), _square(slope)
    patience = max(500, x[0].numel())
    best, best_x, idle = gamma.clone(), x.clone(), torch.zeros_like(gamma)
    active = gamma > tolerance**2 * first
    iterations = torch.zeros_like(gamma, dtype=torch.int64)
    # one tensor for all iterations, doubled when full: thousands of small ones fragment the heap
    history = gamma.new_zeros(2, min(max_iterations, 512), len(gamma))
    count = 0
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        image = rows(direction)
        energy = sum(_square(part) for part in image)
        assert isinstance(energy, Tensor)
        step = torch.where(active & (energy > 0), gamma / energy, torch.zeros_like(gamma))
        x = x + _along(step, direction)
        residual = tuple(r - _along(step, a) for r, a in zip(residual, image, strict=True))
        slope = adjoint(residual)
        fresh = _square(slope)
        ratio = torch.where(active & (gamma > 0), fresh / gamma, torch.zeros_like(gamma))
        direction = slope + _along(ratio, direction)
        if count == history.shape[1]:
            history = torch.cat([history, torch.zeros_like(history)], dim=1)
        history[0, count], history[1, count] = step, ratio
        count += 1
        iterations += active
        gamma = torch.where(active, fresh, gamma)
        better = active & (gamma < best)
        best = torch.where(better, gamma, best)
        best_x = torch.where(_expand(better, x), x, best_x)
        idle = torch.where(better, torch.zeros_like(idle), idle + 1)
        active = active & (gamma > tolerance**2 * first) & (idle < patience) & (energy > 0)
    return LeastSquares(
        best_x, iterations, _condition(history[:, :count], iterations), best <= tolerance**2 * first
    )


def _condition(history: Tensor, iterations: Tensor) -> Tensor:
    """σ_max/σ_min from the tridiagonal matrix that conjugate gradients build on the way.

    Its diagonal is 1/α_j + β_{j−1}/α_{j−1}, its off-diagonal √β_j/α_j; `history` holds α_j and
    β_j, (2, iterations, victims).
    """
    found = torch.ones(len(iterations), dtype=torch.float64)
    if not history.shape[1]:
        return found.to(iterations.device)
    alphas, betas = history.cpu().double().numpy()
    for victim, count in enumerate(iterations.tolist()):
        alpha, beta = alphas[:count, victim], betas[:count, victim]
        if count < 2 or not (alpha > 0).all():
            continue
        diagonal = 1 / alpha
        diagonal[1:] += beta[:-1] / alpha[:-1]
        values = eigvalsh_tridiagonal(diagonal, np.sqrt(beta[:-1]) / alpha[:-1])
        positive = values[values > values[-1] * 1e-20]
        found[victim] = float(np.sqrt(positive[-1] / positive[0]))
    return found.to(iterations.device)


def _square(part: Tensor) -> Tensor:
    return part.flatten(1).square().sum(1)


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *([1] * (like.ndim - 1)))


def _along(step: Tensor, direction: Tensor) -> Tensor:
    return _expand(step, direction) * direction


def _minus(left: Rows, right: Rows) -> Rows:
    return tuple(a - b for a, b in zip(left, right, strict=True))
