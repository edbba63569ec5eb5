"""One step of the recursion: from what follows a stage to what precedes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leaklib.attacks.recursive.deficit import fill_deficit
from leaklib.attacks.recursive.residual import solve_residual
from leaklib.attacks.recursive.rows import Rows, Solved
from leaklib.attacks.recursive.upstream import upstream_of
from leaklib.chain import (
    ConvStage,
    ElementwiseStage,
    LinearStage,
    PoolStage,
    ReshapeStage,
    ResidualStage,
    Stage,
)
from leaklib.layer_system.least_squares import least_squares
from leaklib.layer_system.operators import LayerSystem, balanced_scale, transposed_weight_rows
from leaklib.layer_system.solve import Solver, solve_layer
from leaklib.rank.blocks import pooling_rank
from leaklib.rank.counting import generic_rank


@dataclass(frozen=True)
class StepSettings:
    """How layers are solved; see `rgap`.

    Args:
        solver: of a convolution.
        deficient: "minimum norm" or "hybrid".
        truncation: of the solver "gradient first".
        tolerance: of conjugate gradients; also how far from zero a ReLU's output counts as zero.
        rounding: keep float32 values between layers, as the published code does.
        keep_inputs: remember the input of every layer.
        keep_system: remember the equations of the convolution just solved.
    """

    solver: Solver
    deficient: str
    truncation: float
    tolerance: float
    rounding: bool
    keep_inputs: bool = False
    keep_system: bool = False


def step(
    stages: tuple[Stage, ...],
    index: int,
    rows: Rows,
    grads: Mapping[str, Tensor],
    settings: StepSettings,
) -> Rows:
    """Undo stage `index` for all rows."""
    stage = stages[index]
    if isinstance(stage, ReshapeStage):
        shape = (-1, *stage.input_shape)
        known = None if rows.known is None else rows.known.reshape(shape)
        moved = replace(
            rows, value=rows.value.reshape(shape), grad=rows.grad.reshape(shape), known=known
        )
    elif isinstance(stage, ElementwiseStage):
        moved = _undo_activation(stage, rows, settings)
    elif isinstance(stage, PoolStage):
        before = stages[index - 1] if index else None
        # behind a convolution the pooling is part of its equations
        moved = rows if isinstance(before, ConvStage) else _undo_pooling(stage, rows, settings)
    elif isinstance(stage, LinearStage):
        moved = _undo_linear(stage, rows, grads, settings)
    elif isinstance(stage, ResidualStage):
        moved = _undo_residual(stage, rows, grads, settings)
    else:
        moved = _undo_convolution(stages, index, stage, rows, grads, settings)
    if settings.rounding:
        moved = replace(moved, value=_single(moved.value), grad=_single(moved.grad))
    return moved


def _undo_activation(stage: ElementwiseStage, rows: Rows, settings: StepSettings) -> Rows:
    """Find z = σ⁻¹(x) and k = ∂L/∂x ⊙ σ'(z)."""
    inverse, value, known, sides = stage.inverse, rows.value, rows.known, rows.sides
    if inverse.known is not None:
        # a ReLU's zeros come back as rounding: snap them, or their derivative would be 1
        size = value.flatten(1).abs().amax(1).view(-1, *[1] * (value.ndim - 1))
        value = torch.where(
            value <= 1e4 * settings.tolerance * size, torch.zeros_like(value), value
        )
        seen = inverse.known(value)
        known = seen if known is None else seen & known
    if inverse.kink is not None:
        sides = sides | {stage.name: value >= inverse.kink}
    return replace(
        rows, value=inverse.preactivation(value), grad=rows.grad * inverse.slope(value),
        known=known, sides=sides,
    )  # fmt: skip


def _undo_linear(
    stage: LinearStage, rows: Rows, grads: Mapping[str, Tensor], settings: StepSettings
) -> Rows:
    """Find x = ∇Wᵀk/(kᵀk): the gradient is an outer product, so it alone gives the input."""
    grad = grads[f"{stage.name}.weight"][rows.victim]
    k = rows.grad
    energy = k.square().sum(1, keepdim=True)
    if settings.solver == "published":
        # the mean of ∇W_j/k_j over rows, small k_j and all
        ratios = torch.where(k[..., None] != 0, grad / k[..., None], torch.zeros_like(grad))
        x = ratios.sum(1) / (k != 0).sum(1, keepdim=True)
    else:
        x = torch.einsum("roi,ro->ri", grad, k) / energy
    z = rows.value if stage.bias is None else rows.value - stage.bias
    wrong_z = x @ stage.weight.T - z
    if rows.known is not None:
        wrong_z, z = wrong_z * rows.known, z * rows.known
    wrong_g = (k[..., None] * x[:, None] - grad).flatten(1)
    scale = stage.weight.norm() / stage.weight.shape[0] ** 0.5 / k.norm(dim=1, keepdim=True)
    size = z.square().sum(1) + (scale * grad.flatten(1)).square().sum(1)
    wrong = wrong_z.square().sum(1) + (scale * wrong_g).square().sum(1)
    solved = Solved(
        stage.name, (wrong / size).sqrt(), torch.ones_like(size), stage.weight.shape[1],
        stage.weight.shape[1],
    )  # fmt: skip
    return rows.after(x, k @ stage.weight, solved)


def _undo_convolution(
    stages: tuple[Stage, ...],
    index: int,
    stage: ConvStage,
    rows: Rows,
    grads: Mapping[str, Tensor],
    settings: StepSettings,
) -> Rows:
    """The layer's linear system, and the hybrid where it is short of equations."""
    behind = stages[index + 1]
    pool = behind if isinstance(behind, PoolStage) else None
    k = rows.grad if pool is None else pool.transposed(rows.grad)
    if pool is not None and settings.solver in ("published", "gradient first"):
        raise ValueError(
            f'expected solver "auto" or "balanced" for {stage.name!r} with average pooling behind '
            f"it, got {settings.solver!r}"
        )
    system = LayerSystem(
        stage.geometry, stage.weight, k, balanced_scale(stage.geometry, stage.weight, k),
        rows.known, pool,
    )  # fmt: skip
    z = rows.value
    if stage.bias is not None:
        bias = stage.bias.view(1, -1, 1, 1)
        z = z - (bias if pool is None else pool.forward(bias.expand(1, *stage.output_shape)))
    grad = grads[f"{stage.name}.weight"][rows.victim]
    found = solve_layer(
        system, z, grad, solver=settings.solver, tolerance=settings.tolerance,
        truncation=settings.truncation,
    )  # fmt: skip
    rank = _rank(stage, rows.known, pool)
    x, steps = found.x, None
    before = upstream_of(stages, index)
    if (
        settings.deficient == "hybrid"
        and rows.known is None
        and pool is None
        and rank < stage.geometry.unknowns
        and before is not None
    ):
        x, steps = fill_deficit(before, system, z, grad, grads, rows.victim)
    solved = Solved(
        stage.name, found.residual, found.condition, stage.geometry.unknowns, rank, steps
    )
    moved = rows.after(x, transposed_weight_rows(stage.geometry, stage.weight, k), solved)
    if settings.keep_system:
        moved = replace(moved, system=system, target=system.target(z, grad))
    return moved


def _rank(stage: ConvStage, known: Tensor | None, pool: PoolStage | None) -> int:
    """Generic rank; an upper bound behind a ReLU or in front of a pooling."""
    count = generic_rank(stage.geometry)
    if known is not None:
        equations = int(known.flatten(1).sum(1).amax())
    elif pool is not None:
        equations = math.prod(pool.output_shape)
    else:
        return count.rank
    return min(count.rank, count.gradient_rank + equations)


def _undo_pooling(stage: PoolStage, rows: Rows, settings: StepSettings) -> Rows:
    """The input of minimum norm: without weights there are no gradient rows to say more."""
    found = least_squares(
        lambda x: (stage.forward(x),),
        lambda r: stage.transposed(r[0]),
        (rows.value,),
        tolerance=settings.tolerance,
    )
    residual = (stage.forward(found.x) - rows.value).flatten(1).norm(dim=1)
    size = rows.value.flatten(1).norm(dim=1)
    unknowns = found.x[0].numel()
    solved = Solved(stage.name, residual / size, found.condition, unknowns, pooling_rank(stage))
    return rows.after(found.x, stage.transposed(rows.grad), solved)


def _undo_residual(
    stage: ResidualStage, rows: Rows, grads: Mapping[str, Tensor], settings: StepSettings
) -> Rows:
    """Both branches at once; see `solve_residual`."""
    if rows.known is not None:
        raise ValueError(
            f"expected an invertible activation behind the residual block {stage.name!r}, got "
            "ReLU, which hides entries of its sum; use LeakyReLU"
        )
    mine = {
        part.name: grads[f"{part.name}.weight"][rows.victim]
        for part in (stage.first, stage.second, stage.shortcut)
        if part is not None
    }
    found = solve_residual(
        stage, rows.value, rows.grad, mine, rows.victim, tolerance=settings.tolerance
    )
    unknowns = stage.first.geometry.unknowns
    identity = stage.shortcut is None
    solved = Solved(
        stage.name, found.residual, found.condition, unknowns, unknowns if identity else None
    )
    return rows.after(found.x, found.grad, solved)


def _single(value: Tensor) -> Tensor:
    return value.float().double()
