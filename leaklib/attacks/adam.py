"""Adam over many independent problems: per-row learning rate, plateau, early stop, best iterate.

Batching must not change a result, so nothing here is shared between rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.attacks.lbfgs import Evaluate

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class AdamSettings:
    """How the steps are taken.

    Args:
        lr: first learning rate.
        signed: replace the gradient by its sign before Adam sees it (Geiping et al. 2020).
        steps: planned number of steps; with `milestones` it fixes the decay.
        milestones: fractions of `steps` after which the learning rate falls tenfold.
        patience: evaluations without improvement after which a row's learning rate falls
            tenfold; 0 never.
        stop_after: evaluations without improvement after which a row stops; 0 never.
        stop_below: a row stops when its objective is below this.
        box: interval the variables are clipped to after each step; None for no clipping.
    """

    lr: float = 0.1
    signed: bool = True
    steps: int = 24_000
    milestones: tuple[float, ...] = (3 / 8, 5 / 8, 7 / 8)
    patience: int = 0
    stop_after: int = 0
    stop_below: float = 0.0
    box: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.steps < 1 or min(self.patience, self.stop_after) < 0:
            raise ValueError(
                "expected lr > 0, steps >= 1, patience >= 0 and stop_after >= 0, got "
                f"lr={self.lr}, steps={self.steps}, patience={self.patience}, "
                f"stop_after={self.stop_after}"
            )
        if self.box is not None and not self.box[0] < self.box[1]:
            raise ValueError(f"expected box=(low, high) with low < high, got {self.box}")


@dataclass
class AdamState:
    """Everything a run needs to go on; tensors with a leading row axis."""

    x: Tensor
    mean: Tensor
    square: Tensor
    lr: Tensor
    waited: Tensor
    best_x: Tensor
    best_value: Tensor
    active: Tensor
    evaluations: Tensor


def start(x: Tensor, settings: AdamSettings) -> AdamState:
    """State before the first evaluation, at x (rows, size), clipped to the box."""
    x = x.clone() if settings.box is None else x.clamp(*settings.box)
    rows = x.shape[0]
    return AdamState(
        x=x,
        mean=torch.zeros_like(x),
        square=torch.zeros_like(x),
        lr=torch.full((rows,), settings.lr, dtype=torch.float64, device=x.device),
        waited=torch.zeros(rows, dtype=torch.int64, device=x.device),
        best_x=x.clone(),
        best_value=torch.full((rows,), torch.inf, dtype=torch.float64, device=x.device),
        active=torch.ones(rows, dtype=torch.bool, device=x.device),
        evaluations=torch.zeros(rows, dtype=torch.int64, device=x.device),
    )


def tick(state: AdamState, evaluate: Evaluate, settings: AdamSettings) -> None:
    """Evaluate every active row once and take one step; changes `state` in place.

    m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², x ← x − lr · m̂ / (√v̂ + ε), then clip to the box.
    The iterate kept as best is the one that was evaluated, not the one after the step.
    """
    rows = state.active.nonzero().squeeze(1)
    value, gradient = evaluate(state.x[rows], rows)
    value = torch.where(torch.isfinite(value), value, torch.inf).double()
    state.evaluations[rows] += 1
    count = state.evaluations[rows]

    better = value < state.best_value[rows]
    state.best_x[rows[better]] = state.x[rows[better]]
    state.best_value[rows[better]] = value[better]
    state.waited[rows] = torch.where(better, 0, state.waited[rows] + 1)
    _lower_rate(state, rows, count, settings)

    step = torch.sign(gradient) if settings.signed else gradient
    mean = BETAS[0] * state.mean[rows] + (1 - BETAS[0]) * step
    square = BETAS[1] * state.square[rows] + (1 - BETAS[1]) * step * step
    exponent = count[:, None].to(gradient.dtype)
    unbiased_mean = mean / (1 - BETAS[0] ** exponent)
    unbiased_square = square / (1 - BETAS[1] ** exponent)
    lr = state.lr[rows, None].to(gradient.dtype)
    moved = state.x[rows] - lr * unbiased_mean / (unbiased_square.sqrt() + EPSILON)
    state.x[rows] = moved if settings.box is None else moved.clamp(*settings.box)
    state.mean[rows], state.square[rows] = mean, square

    stop = (value <= settings.stop_below) | ~torch.isfinite(gradient).all(1)
    if settings.stop_after:
        stop |= state.waited[rows] >= settings.stop_after
    state.active[rows[stop]] = False


def _lower_rate(state: AdamState, rows: Tensor, count: Tensor, settings: AdamSettings) -> None:
    """Tenfold decay at the milestones of the plan, or when a row's patience is spent."""
    for milestone in settings.milestones:
        due = count == int(milestone * settings.steps) + 1
        state.lr[rows[due]] *= 0.1
    if settings.patience:
        waited = state.waited[rows]
        due = (waited > 0) & (waited % settings.patience == 0)
        state.lr[rows[due]] *= 0.1
