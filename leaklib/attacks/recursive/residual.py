"""A residual block undone: both branches at once.

The block is s = W₂ a + b₂ + h(x) with a = σ(W₁ x + b₁). Known are s and k_s = ∂L/∂s. Once it is
known on which side of the kink each entry of a lies, all equations are linear in (a, x):

    K₂ a = ∇W₂,   W₂ a + h(x) = s − b₂,   W₁ x − D a = −b₁,   K₁ x = ∇W₁,

with D = 1/σ'. The identity path hands over all of x: W₁(s − W₂ a) = D a has as many equations as
unknowns. Source: our derivation; the paper has no public code for skip connections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leaklib.chain import ConvStage, ResidualStage
from leaklib.layer_system.least_squares import Rows, least_squares
from leaklib.layer_system.operators import LayerSystem, balanced_scale, transposed_weight_rows
from leaklib.layer_system.solve import solve_layer

# Above this residual the kinks are thought wrong, and the block is solved again, more carefully.
_STUCK = 1e-5


@dataclass(frozen=True)
class BlockSolution:
    """Input of a block, gradient there, and how well its equations hold, one entry a row."""

    x: Tensor
    grad: Tensor
    residual: Tensor
    condition: Tensor


@dataclass(frozen=True)
class _Linearised:
    """The block's equations with the slopes of σ frozen: rows, their transpose, right-hand side."""

    stage: ResidualStage
    outer: LayerSystem
    inner: LayerSystem
    across: LayerSystem | None
    stretch: Tensor
    target: Rows

    def rows(self, u: Tensor) -> Rows:
        a, x = _parts(self.stage, u)
        pre, grad = self.outer.rows(a)
        pre_x, grad_x = self.inner.rows(x)
        if self.across is None:
            return grad, pre + x, pre_x - self.stretch * a, grad_x
        pre_h, grad_h = self.across.rows(x)
        return grad, pre + pre_h, pre_x - self.stretch * a, grad_x, grad_h

    def adjoint(self, r: Rows) -> Tensor:
        at_a = self.outer.adjoint((r[1], r[0])) - self.stretch * r[2]
        at_x = self.inner.adjoint((r[2], r[3]))
        at_x = at_x + (r[1] if self.across is None else self.across.adjoint((r[1], r[4])))
        return torch.cat([at_a.flatten(1), at_x.flatten(1)], dim=1)

    def mismatch(self, u: Tensor) -> Tensor:
        pairs = zip(self.rows(u), self.target, strict=True)
        return torch.stack([(p - q).flatten(1).square().sum(1) for p, q in pairs]).sum(0)

    def relative(self, u: Tensor) -> Tensor:
        size = torch.stack([q.flatten(1).square().sum(1) for q in self.target]).sum(0)
        return (self.mismatch(u) / size).sqrt()


def solve_residual(
    stage: ResidualStage,
    total: Tensor,
    total_grad: Tensor,
    grads: Mapping[str, Tensor],
    victims: Tensor,
    *,
    tolerance: float = 1e-13,
    max_rounds: int = 40,
) -> BlockSolution:
    """Find x of a residual block by linear systems whose kinks are updated in between.

    A round is a Gauss-Newton step, shortened where it would make the equations worse. The first
    guess of a is the least-squares answer of K₂ a = ∇W₂ alone, exact where K₂ has full column rank;
    elsewhere rounds may end in a wrong set of kinks, which the residual then shows.

    Args:
        stage: the block.
        total: s (rows, *output shape).
        total_grad: k_s, of the same shape.
        grads: name of each convolution -> ∂L/∂W (rows, *weight shape).
        victims: whose row it is (rows,); a victim with one row solved needs no second try.
        tolerance: of the conjugate gradients and of the rounds.
        max_rounds: bound on the rounds.

    Returns:
        BlockSolution. Cost: a few rounds of conjugate gradients on (a, x).
    """
    second, inverse = stage.second, stage.activation.inverse
    blind = LayerSystem(
        second.geometry, second.weight, total_grad,
        balanced_scale(second.geometry, second.weight, total_grad), torch.zeros_like(total),
    )  # fmt: skip
    a = solve_layer(blind, total, grads[second.name], tolerance=tolerance).x
    at_a = transposed_weight_rows(second.geometry, second.weight, total_grad)
    start = torch.cat([a.flatten(1), a.new_zeros(len(a), stage.first.geometry.unknowns)], dim=1)

    def equations(rows: Tensor) -> Callable[[Tensor], _Linearised]:
        mine = {name: grad[rows] for name, grad in grads.items()}
        return lambda u: _linearise(
            stage, _parts(stage, u)[0], total[rows], total_grad[rows], at_a[rows], mine
        )

    everything = torch.arange(len(total), device=total.device)
    u, condition = _gauss_newton(equations(everything), start, tolerance, max_rounds)
    relative = equations(everything)(u).relative(u)
    best = relative.new_full((int(victims.max()) + 1,), torch.inf)
    best = best.scatter_reduce(0, victims, relative, "amin")
    stuck = (best[victims] > _STUCK).nonzero()[:, 0]
    if len(stuck):
        linearise = equations(stuck)
        again = _cautious(linearise, start[stuck], tolerance)
        again, fresh = _gauss_newton(linearise, again, tolerance, max_rounds)
        better = linearise(again).relative(again).lt(relative[stuck])
        u[stuck] = torch.where(better[:, None], again, u[stuck])
        condition[stuck] = torch.where(better, fresh, condition[stuck])
    a, x = _parts(stage, u)
    first, shortcut = stage.first, stage.shortcut
    at_x = transposed_weight_rows(first.geometry, first.weight, at_a * inverse.slope(a))
    if shortcut is None:
        at_x = at_x + total_grad
    else:
        at_x = at_x + transposed_weight_rows(shortcut.geometry, shortcut.weight, total_grad)
    return BlockSolution(x, at_x, equations(everything)(u).relative(u), condition)


def _gauss_newton(
    linearise: Callable[[Tensor], _Linearised], u: Tensor, tolerance: float, max_rounds: int
) -> tuple[Tensor, Tensor]:
    """Solve the linearised equations again and again; a step that makes them worse is halved."""
    worth = torch.full((len(u),), torch.inf, dtype=u.dtype, device=u.device)
    condition, moving = torch.ones_like(worth), torch.ones_like(worth, dtype=torch.bool)
    for _ in range(max_rounds):
        linear = linearise(u)
        found = least_squares(linear.rows, linear.adjoint, linear.target, tolerance=tolerance)
        condition = torch.where(moving, found.condition, condition)
        move, share = found.x - u, moving.to(u.dtype)
        for _ in range(12):
            fresh = u + share[:, None] * move
            value = linearise(fresh).mismatch(fresh)
            worse = moving & (value >= worth)
            if not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
        better = moving & (value < worth)
        u = torch.where(better[:, None], fresh, u)
        worth = torch.where(better, value, worth)
        moving = better & (move.norm(dim=1) > 10 * tolerance * found.x.norm(dim=1))
        if not bool(moving.any()):
            break
    return u, condition


def _cautious(linearise: Callable[[Tensor], _Linearised], u: Tensor, tolerance: float) -> Tensor:
    """A better start: short steps in which K₁, made of guessed slopes, counts for little.

    The other equations depend on the slopes through D alone, one entry at a time.
    """
    for _ in range(15):
        linear = linearise(u)
        inner = replace(linear.inner, scale=0.1 * linear.inner.scale)
        target = (*linear.target[:3], 0.1 * linear.target[3], *linear.target[4:])
        linear = replace(linear, inner=inner, target=target)
        found = least_squares(linear.rows, linear.adjoint, target, tolerance=tolerance)
        u = u + 0.7 * (found.x - u)
    return u


def _linearise(
    stage: ResidualStage,
    a: Tensor,
    total: Tensor,
    total_grad: Tensor,
    at_a: Tensor,
    grads: Mapping[str, Tensor],
) -> _Linearised:
    first, second, shortcut, inverse = (
        stage.first, stage.second, stage.shortcut, stage.activation.inverse,
    )  # fmt: skip
    outer, inner = _system(second, total_grad), _system(first, at_a * inverse.slope(a))
    across = None if shortcut is None else _system(shortcut, total_grad)
    stretch = 1 / inverse.slope(a).clamp_min(1e-12)
    s = total - _bias(second) - (0.0 if shortcut is None else _bias(shortcut))
    target: Rows = (
        grads[second.name] * _wide(outer.scale),
        s,
        inverse.preactivation(a) - stretch * a - _bias(first),
        grads[first.name] * _wide(inner.scale),
    )
    if across is not None and shortcut is not None:
        target = (*target, grads[shortcut.name] * _wide(across.scale))
    return _Linearised(stage, outer, inner, across, stretch, target)


def _system(stage: ConvStage, k: Tensor) -> LayerSystem:
    return LayerSystem(
        stage.geometry, stage.weight, k, balanced_scale(stage.geometry, stage.weight, k)
    )


def _bias(stage: ConvStage) -> Tensor | float:
    return 0.0 if stage.bias is None else stage.bias.view(1, -1, 1, 1)


def _wide(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1, 1, 1)


def _parts(stage: ResidualStage, u: Tensor) -> tuple[Tensor, Tensor]:
    split = stage.second.geometry.unknowns
    a, x = u[:, :split], u[:, split:]
    return a.reshape(-1, *stage.second.input_shape), x.reshape(-1, *stage.input_shape)
