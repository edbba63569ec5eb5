"""Gradient matching inside the null space of a deficient layer.

Over y and the input x_{i−1} of the layer before, the mismatch of that layer's equations is sought:

    min ‖W x_{i−1} + b − σ⁻¹(x_min + N y)‖² + s² ‖K(y) x_{i−1} − ∇W‖².

For piecewise-linear activations it is quadratic as long as no entry of x_i changes its side of the
kink. Source: our derivation, in place of the paper's H-GAP, which has no public code.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from leaklib.attacks.recursive.upstream import Upstream
from leaklib.layer_system.least_squares import Rows, least_squares
from leaklib.layer_system.operators import LayerSystem, balanced_scale
from leaklib.layer_system.solve import residual_of

_STEPS, _WARM = 60, 20
# Residual of the layer before below which its equations are thought met, float32 gradients too.
_FOUND = 1e-4


def match_in_null_space(
    upstream: Upstream, x: Tensor, null: Tensor, at_x: Tensor, weight_grad: Tensor
) -> tuple[Tensor, int]:
    """Gauss-Newton on the weight and gradient rows of the layer before, over (x_{i−1}, y).

    Args:
        upstream: the layer before.
        x: x_min (channels, height, width).
        null: N (unknowns, missing).
        at_x: W_iᵀk_i, the gradient at x, of the same shape.
        weight_grad: ∂L/∂W_{i−1}.

    Returns:
        x_i and the number of steps; x_min and 0 where the search ends in a wrong set of kinks,
        which the layer's residual betrays. Cost: a few dozen runs of conjugate gradients.
    """
    conv = upstream.conv
    size = conv.geometry.unknowns
    before = x.new_zeros(size)
    y = x.new_zeros(null.shape[1])

    def linearise(y: Tensor) -> tuple[LayerSystem, Tensor, Tensor]:
        z, stretch = upstream.preactivation(x + (null @ y).view_as(x))
        k = (at_x / stretch)[None]
        scale = balanced_scale(conv.geometry, conv.weight, k)
        return LayerSystem(conv.geometry, conv.weight, k, scale), z, stretch

    def mismatch(before: Tensor, y: Tensor) -> float:
        system, z, _ = linearise(y)
        target = system.target(z[None], weight_grad[None])
        return float(residual_of(system, target, before.view(1, *conv.input_shape)))

    def solve(y: Tensor, share: float, tolerance: float, most: int) -> tuple[Tensor, Tensor]:
        system, z, stretch = linearise(y)
        system = replace(system, scale=share * system.scale)
        offset = (z.flatten() - stretch.flatten() * (null @ y)).view(1, *z.shape)

        def rows(u: Tensor) -> Rows:
            pre, grad = system.rows(u[:, :size].view(1, *conv.input_shape))
            return pre - stretch * (null @ u[0, size:]).view_as(stretch), grad

        def adjoint(r: Rows) -> Tensor:
            at_y = -(null.T @ (stretch * r[0][0]).flatten())
            return torch.cat([system.adjoint(r).flatten(), at_y])[None]

        target = system.target(offset, weight_grad[None])
        solved = least_squares(rows, adjoint, target, tolerance=tolerance, max_iterations=most).x[0]
        return solved[:size], solved[size:]

    # K depends on guessed kinks: at first its rows count for little, and steps are half as long
    for round_ in range(_WARM):
        solved, solved_y = solve(y, 10.0 ** (2 * round_ / _WARM - 2), 1e-4, 400)
        before, y = (before + solved) / 2, (y + solved_y) / 2
    worth, steps = torch.inf, 0
    for _ in range(_STEPS):
        solved, solved_y = solve(y, 1.0, *((1e-13, 4_000) if worth < _FOUND else (1e-6, 800)))
        share, fresh = 1.0, torch.inf
        while share > 1e-3:
            at = before + share * (solved - before), y + share * (solved_y - y)
            if (fresh := mismatch(*at)) < worth:
                break
            share /= 2
        if not fresh < worth:
            break
        before, y = at
        shrink, worth, steps = fresh / worth, fresh, steps + 1
        if shrink > 0.99:
            break
    if not worth < _FOUND:
        return x, 0  # a wrong set of kinks: the answer of minimum norm is the better guess
    return x + (null @ y).view_as(x), steps
