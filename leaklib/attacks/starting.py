"""Where a search starts: noise, grey, or variables that are given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from leaklib.attacks.problem import Variables
from leaklib.gradients.payload import SharedGradient

STARTS = ("normal", "uniform", "grey")


def starting_variables(
    shapes: Mapping[str, tuple[int, ...]],
    shared: SharedGradient,
    restarts: int,
    start: str | Mapping[str, Tensor],
    generator: torch.Generator,
) -> Variables:
    """Starting variables, drawn row by row: the first row does not depend on how many follow.

    Args:
        shapes: variable -> shape of one row.
        shared: the released gradients, for the number of victims, dtype and device.
        restarts: rows per victim.
        start: "normal" N(0, 1), "uniform" in [0, 1], "grey" 0.5 everywhere, or the variables
            themselves. Label logits are always normal.
        generator: source of the draws.

    Returns:
        Variable -> (victims * restarts, *shape).

    Raises:
        ValueError: an unknown name, or variables of another shape.
    """
    rows = shared.victims * restarts
    if not isinstance(start, str):
        for name, shape in shapes.items():
            got = tuple(start[name].shape) if name in start else None
            if got != (rows, *shape):
                raise ValueError(f"expected start[{name!r}] of shape {(rows, *shape)}, got {got}")
        return {n: start[n].to(shared.device, shared.dtype) for n in shapes}
    if start not in STARTS:
        raise ValueError(f"expected start among {', '.join(STARTS)}, got {start!r}")

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "label_logits" or start == "normal":
            return torch.randn(shape, generator=generator, device=generator.device)
        if start == "uniform":
            return torch.rand(shape, generator=generator, device=generator.device)
        return torch.full(shape, 0.5)

    drawn = [{name: draw(name, shape) for name, shape in shapes.items()} for _ in range(rows)]
    return {
        n: torch.stack([row[n] for row in drawn]).to(shared.device, shared.dtype) for n in shapes
    }
