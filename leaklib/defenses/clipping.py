"""Clipping: bound the length of the released gradient."""

from dataclasses import dataclass
from typing import Literal

import torch

from leaklib.defenses._base import check_choice, check_level, per_victim, squared_norms
from leaklib.gradients.payload import SharedGradient, check_finite

__all__ = ["Clip"]


@dataclass(frozen=True)
class Clip:
    """Shrink a gradient that is longer than C: ĝ = g · min(1, C/‖g‖).

    The norm is that of what one victim shares, so this is the clipping of a client's update. The
    clipping of single examples inside a batch (DP-SGD) happens before the batch is averaged and
    cannot be done here.

    Settings:
        max_norm: C > 0.
        scope: "global" for one L2 norm over all tensors, "tensor" for one per tensor.

    Raises:
        ValueError: A setting out of range; at the call, a gradient that is not finite.

    >>> shared = SharedGradient({"fc.weight": torch.tensor([[3.0, 4.0]])}, batch=1)
    >>> Clip(1.0)(shared).tensors["fc.weight"]
    tensor([[0.6000, 0.8000]])
    """

    max_norm: float
    scope: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        check_level(self.max_norm, "max_norm", allow_zero=False)
        check_choice(self.scope, ("global", "tensor"), "scope")

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return the clipped gradient; a victim within the bound keeps its values exactly."""
        check_finite(shared)
        squares = squared_norms(shared)
        if self.scope == "global":
            total = torch.stack(list(squares.values())).sum(dim=0)
            squares = dict.fromkeys(squares, total)
        # C/0 is inf and the minimum 1: a zero gradient stays zero.
        factors = {name: (self.max_norm / one.sqrt()).clamp(max=1) for name, one in squares.items()}
        return shared.replace(
            {name: tensor * per_victim(factors[name], tensor) for name, tensor in shared.items()}
        )
