"""One layer's input from its output, its gradient and the gradient at its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from leaklib.layer_system.block import gradient_block, grouped_weight_grad, solve_block
from leaklib.layer_system.least_squares import least_squares
from leaklib.layer_system.operators import LayerSystem
from leaklib.layer_system.published import solve_stacked
from leaklib.layer_system.split import CUTOFF, solve_split

Solver = Literal["auto", "balanced", "gradient first", "published"]
SOLVERS: tuple[str, ...] = get_args(Solver)

# The block is dense, pixels x pixels a victim: beyond this the operators are as fast.
_BLOCK_PIXELS = 512
_BLOCK_CONDITION = 1e4


@dataclass(frozen=True)
class LayerSolution:
    """What one layer's system gave.

    Args:
        x: the layer's input (victims, *input shape).
        residual: ‖U x − b‖/‖b‖ of the balanced system (victims,).
        condition: σ_max/σ_min of the system that was solved (victims,).
    """

    x: Tensor
    residual: Tensor
    condition: Tensor


def solve_layer(
    system: LayerSystem,
    preactivation: Tensor,
    weight_grad: Tensor,
    *,
    solver: Solver = "auto",
    tolerance: float = 1e-13,
    max_iterations: int = 4_000,
    truncation: float = CUTOFF,
) -> LayerSolution:
    """Solve min ‖[W; s K] x − [z; s ∇W]‖ for many victims, of minimum norm where deficient.

    Args:
        system: the layer, with balanced rows.
        preactivation: z without bias (victims, *output shape).
        weight_grad: ∂L/∂W (victims, *weight shape).
        solver: "auto" solves the small block of the gradient rows directly where it has full rank,
            and runs conjugate gradients on all rows else; "balanced" always does the latter;
            "gradient first" splits the two kinds of rows (dense); "published" stacks them unscaled.
        tolerance: of the conjugate gradients.
        max_iterations: bound on their products.
        truncation: see `solve_split`; only for "gradient first".

    Returns:
        LayerSolution.
    """
    target = system.target(preactivation, weight_grad)
    victims = len(weight_grad)
    if solver == "published":
        plain = LayerSystem(
            system.geometry, system.weight, system.preactivation_grad,
            torch.ones_like(system.scale), system.known, system.pool,
        )  # fmt: skip
        x = solve_stacked(plain, preactivation, weight_grad)
        return _finish(system, target, x, torch.full_like(system.scale, torch.nan))
    if solver == "gradient first":
        parts = [
            solve_split(
                system.geometry, system.weight, preactivation[v], system.preactivation_grad[v],
                weight_grad[v], known=None if system.known is None else system.known[v],
                truncation=truncation,
            )
            for v in range(victims)
        ]  # fmt: skip
        condition = system.scale.new_tensor([part.condition for part in parts])
        return _finish(system, target, torch.stack([part.x for part in parts]), condition)
    x = preactivation.new_zeros(victims, *system.geometry.input_shape)
    condition = torch.full_like(system.scale, torch.inf)
    if solver == "auto" and _block_may_suffice(system):
        x, condition = _solve_by_block(system, weight_grad)
    left = (condition > _BLOCK_CONDITION).nonzero()[:, 0]
    if len(left):
        part = system.select(left)
        found = least_squares(
            part.rows, part.adjoint, tuple(b[left] for b in target), tolerance=tolerance,
            max_iterations=max_iterations,
        )  # fmt: skip
        x, condition = x.clone(), condition.clone()
        x[left], condition[left] = found.x, found.condition
    return _finish(system, target, x, condition)


def residual_of(system: LayerSystem, target: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """‖U x − b‖/‖b‖, one number a victim."""
    rows = system.rows(x)
    wrong = sum((a - b).flatten(1).square().sum(1) for a, b in zip(rows, target, strict=True))
    size = sum(b.flatten(1).square().sum(1) for b in target)
    assert isinstance(wrong, Tensor)
    assert isinstance(size, Tensor)
    return (wrong / size.clamp_min(1e-300)).sqrt()


def _finish(
    system: LayerSystem, target: tuple[Tensor, ...], x: Tensor, condition: Tensor
) -> LayerSolution:
    return LayerSolution(x, residual_of(system, target, x), condition)


def _block_may_suffice(system: LayerSystem) -> bool:
    geometry = system.geometry
    pixels = geometry.input_shape[1] * geometry.input_shape[2]
    rows = geometry.filters // geometry.groups * geometry.kernel[0] * geometry.kernel[1]
    return rows >= pixels and pixels <= _BLOCK_PIXELS


def _solve_by_block(system: LayerSystem, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    block = gradient_block(system.geometry, system.preactivation_grad)
    x, condition = solve_block(block, grouped_weight_grad(system.geometry, weight_grad))
    return x.mT.reshape(-1, *system.geometry.input_shape), condition
