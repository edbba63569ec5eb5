"""The smoothest picture among all that a deficient image layer allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leaklib.attacks.recursive.rows import Rows
from leaklib.chain import ElementwiseStage, Stage
from leaklib.layer_system.split import solve_split

_SMOOTHING = 1e-3
_BOX_WEIGHT = 10.0


def smooth_null_space(before: tuple[Stage, ...], rows: Rows, *, steps: int = 800) -> Tensor:
    """Minimise colour-coupled total variation over x = x_min + N y, inside the pixel range.

        Σ_pixels √(Σ_channels (∂₁x)² + (∂₂x)² + ε²) + 10 Σ distance from [0, 1]

    No equation is touched: N spans what no row of the layer sees. Colours share their edges, which
    is why the channels stand under one root. Adam with a cosine decay. Source: our derivation.

    Args:
        before: stages in front of the layer, such as a normalisation: pixels are behind them.
        rows: the recursion in front of the layer, with its system.
        steps: steps of Adam.

    Returns:
        Inputs (rows, channels, height, width). Cost: a dense null space a row.
    """
    system, target = rows.system, rows.target
    assert system is not None
    assert target is not None
    found = []
    for row in range(len(rows.value)):
        grad = target[1][row] / system.scale[row]
        part = solve_split(
            system.geometry, system.weight, target[0][row], system.preactivation_grad[row], grad,
            null_space=True,
        )  # fmt: skip
        assert part.null_space is not None
        found.append(_smoothest(before, part.x, part.null_space, steps))
    return torch.stack(found)


def _smoothest(before: tuple[Stage, ...], x: Tensor, null: Tensor, steps: int) -> Tensor:
    y = torch.zeros(null.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimiser = torch.optim.Adam([y], lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        at = x + (null @ y).view_as(x)
        pixels = at[None]
        for stage in reversed(before):
            assert isinstance(stage, ElementwiseStage)
            pixels = stage.inverse.preactivation(pixels)
        outside = (pixels - pixels.clamp(0, 1)).abs().sum()
        optimiser.zero_grad()
        (_coupled_variation(at) + _BOX_WEIGHT * outside).backward()
        optimiser.step()
        decay.step()
    return (x + (null @ y).view_as(x)).detach()


def _coupled_variation(image: Tensor) -> Tensor:
    """Σ √(Σ_channels (∂₁x)² + (∂₂x)² + ε²) over all pixels; 0 across the border."""
    down = F.pad(image[:, 1:] - image[:, :-1], (0, 0, 0, 1))
    right = F.pad(image[..., 1:] - image[..., :-1], (0, 1))
    return (down.square().sum(0) + right.square().sum(0) + _SMOOTHING**2).sqrt().sum()
