"""Activations that can be undone: z from σ(z), and σ'(z) from σ(z) alone.

A recursive attack knows what an activation gave and needs what it took. The derivative is read off
the output too, so that a kink is decided by the sign of what was reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inverse:
    """How to undo one elementwise map y = σ(z).

    Args:
        name: of the map.
        forward: z -> y.
        preactivation: y -> z; values outside the range of σ are moved to its edge.
        slope: y -> σ'(z).
        kink: the value of y at which the slope jumps, None for smooth maps.
        known: y -> where y tells z; None where it always does.
        affine: whether σ is affine, and so counts as part of a linear layer.
        range: lowest and highest value of σ.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    preactivation: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    kink: float | None = None
    known: Callable[[Tensor], Tensor] | None = None
    affine: bool = False
    range: tuple[float, float] = (-math.inf, math.inf)


# Closer to the edge of a bounded range than this, z is rounding.
_EDGE = 1e-15


def invert_activation(module: nn.Module) -> Inverse | None:
    """The inverse of an activation module, or None if it has none that is known here.

    Known: identity, LeakyReLU, ReLU where it is positive, ELU, sigmoid, tanh, softplus. Source:
    R-GAP's released code for LeakyReLU and sigmoid; the others are inverses of their formulas.
    ReLU's zeros say only z ≤ 0 and k = 0.

    >>> undo = invert_activation(nn.LeakyReLU(0.2))
    >>> undo.preactivation(torch.tensor([3.0, -1.0])), undo.slope(torch.tensor([3.0, -1.0]))
    (tensor([ 3., -5.]), tensor([1.0000, 0.2000]))
    """
    if isinstance(module, nn.Identity):
        return Inverse("identity", module, _same, torch.ones_like, affine=True)
    if isinstance(module, nn.LeakyReLU) and module.negative_slope > 0:
        return _leaky(module)
    if isinstance(module, nn.ReLU) or (
        isinstance(module, nn.LeakyReLU) and not module.negative_slope
    ):
        return Inverse(
            "ReLU",
            torch.relu,
            torch.relu,
            _positive,
            kink=0.0,
            known=_is_positive,
            range=(0.0, math.inf),
        )
    if isinstance(module, nn.ELU):
        return _elu(module.alpha)
    if isinstance(module, nn.Sigmoid):
        return Inverse("sigmoid", torch.sigmoid, _logit, _sigmoid_slope, range=(0.0, 1.0))
    if isinstance(module, nn.Tanh):
        return Inverse("tanh", torch.tanh, _artanh, _tanh_slope, range=(-1.0, 1.0))
    if isinstance(module, nn.Softplus):
        return _softplus(module)
    return None


def affine_map(name: str, gain: Tensor, shift: Tensor) -> Inverse:
    """Undo y = gain z + shift, channel by channel: a normalisation with known statistics."""
    return Inverse(
        name,
        lambda z: gain * z + shift,
        lambda y: (y - shift) / gain,
        lambda y: gain.expand_as(y),
        affine=True,
    )


def _leaky(module: nn.LeakyReLU) -> Inverse:
    slope = module.negative_slope
    return Inverse(
        f"LeakyReLU({slope:g})",
        lambda z: torch.where(z >= 0, z, slope * z),
        lambda y: torch.where(y >= 0, y, y / slope),
        lambda y: torch.where(y >= 0, torch.ones_like(y), torch.full_like(y, slope)),
        kink=0.0,
    )


def _elu(alpha: float) -> Inverse:
    return Inverse(
        f"ELU({alpha:g})",
        lambda z: torch.where(z >= 0, z, alpha * torch.expm1(z.clamp(max=0))),
        lambda y: torch.where(y >= 0, y, torch.log1p((y / alpha).clamp(min=_EDGE - 1, max=0))),
        lambda y: torch.where(y >= 0, torch.ones_like(y), (y + alpha).clamp(min=_EDGE)),
        kink=0.0 if alpha != 1 else None,
        range=(-alpha, math.inf),
    )


def _softplus(module: nn.Softplus) -> Inverse:
    beta, threshold = module.beta, module.threshold

    def preactivation(y: Tensor) -> Tensor:
        inside = (beta * y).clamp(min=_EDGE)
        # log(e^t − 1) = t + log(1 − e^−t); torch's softplus is the identity above its threshold
        return torch.where(
            inside > threshold, y, (inside + torch.log(-torch.expm1(-inside))) / beta
        )

    def slope(y: Tensor) -> Tensor:
        return torch.where(
            beta * y > threshold, torch.ones_like(y), -torch.expm1(-(beta * y).clamp(min=_EDGE))
        )

    return Inverse(f"softplus({beta:g})", module, preactivation, slope, range=(0.0, math.inf))


def _same(value: Tensor) -> Tensor:
    return value


def _is_positive(y: Tensor) -> Tensor:
    return y > 0


def _positive(y: Tensor) -> Tensor:
    return (y > 0).to(y.dtype)


def _logit(y: Tensor) -> Tensor:
    return torch.logit(y.clamp(_EDGE, 1 - _EDGE))


def _sigmoid_slope(y: Tensor) -> Tensor:
    inside = y.clamp(_EDGE, 1 - _EDGE)
    return inside * (1 - inside)


def _tanh_slope(y: Tensor) -> Tensor:
    return 1 - y.clamp(_EDGE - 1, 1 - _EDGE).square()


def _artanh(y: Tensor) -> Tensor:
    return torch.atanh(y.clamp(_EDGE - 1, 1 - _EDGE))
