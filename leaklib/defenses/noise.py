"""Additive noise: Gaussian and Laplace."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leaklib.defenses._base import (
    check_choice,
    check_generator,
    check_level,
    per_victim,
    squared_norms,
)
from leaklib.gradients.payload import SharedGradient, check_finite

__all__ = ["GaussianNoise", "LaplaceNoise"]


@dataclass(frozen=True)
class GaussianNoise:
    """Add independent normal noise: ĝ = g + δ, δ ~ N(0, s²).

    s = std, or std · rms(g) with ``relative_to="rms"``, where rms(g) is the root mean square over
    all entries of one victim's tensors. A relative level carries over from one network to another;
    an absolute one is what a client can apply without looking at its gradient.

    Settings:
        std: Standard deviation, >= 0.
        relative_to: None, or "rms" of each victim's gradient.

    Raises:
        ValueError: A setting out of range; at the call, a missing generator or one on another
            device, or a gradient that is not finite.

    >>> shared = SharedGradient({"fc.weight": torch.zeros(1, 10_000)}, batch=1)
    >>> noisy = GaussianNoise(2.0)(shared, generator=torch.Generator().manual_seed(0))
    >>> round(float(noisy.tensors["fc.weight"].std()), 1)
    2.0
    """

    std: float
    relative_to: Literal["rms"] | None = None

    def __post_init__(self) -> None:
        check_level(self.std, "std", allow_zero=True)
        check_choice(self.relative_to, (None, "rms"), "relative_to")

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return the noisy gradient."""
        return _add_noise(shared, generator, self.std, self.relative_to, "GaussianNoise", _normal)


@dataclass(frozen=True)
class LaplaceNoise:
    """Add independent Laplace noise: ĝ = g + δ, p(δ) = exp(−|δ|/b) / 2b, variance 2b².

    b = scale, or scale · rms(g) with ``relative_to="rms"``; see :class:`GaussianNoise`.

    Settings:
        scale: b, >= 0.
        relative_to: None, or "rms" of each victim's gradient.

    Raises:
        ValueError: As :class:`GaussianNoise`.

    The mean of |δ| is b:

    >>> shared = SharedGradient({"fc.weight": torch.zeros(1, 10_000)}, batch=1)
    >>> noisy = LaplaceNoise(3.0)(shared, generator=torch.Generator().manual_seed(0))
    >>> round(float(noisy.tensors["fc.weight"].abs().mean()), 1)
    3.0
    """

    scale: float
    relative_to: Literal["rms"] | None = None

    def __post_init__(self) -> None:
        check_level(self.scale, "scale", allow_zero=True)
        check_choice(self.relative_to, (None, "rms"), "relative_to")

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return the noisy gradient."""
        return _add_noise(shared, generator, self.scale, self.relative_to, "LaplaceNoise", _laplace)


def _add_noise(
    shared: SharedGradient,
    generator: torch.Generator | None,
    level: float,
    relative_to: str | None,
    defense: str,
    draw: Callable[[Tensor, torch.Generator], Tensor],
) -> SharedGradient:
    """Add `level` times unit noise to every tensor, in the order of the names."""
    generator = check_generator(generator, shared.device, defense)
    check_finite(shared)
    scale = torch.full((shared.victims,), level, dtype=torch.float64, device=shared.device)
    if relative_to == "rms":
        entries = sum(tensor[0].numel() for tensor in shared.tensors.values())
        total = torch.stack(list(squared_norms(shared).values())).sum(dim=0)
        scale = scale * (total / entries).sqrt()
    return shared.replace(
        {
            name: tensor + per_victim(scale, tensor) * draw(tensor, generator)
            for name, tensor in shared.items()
        }
    )


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _laplace(like: Tensor, generator: torch.Generator) -> Tensor:
    # The difference of two exponentials is Laplace, and unlike the logarithm of a uniform number
    # it never meets log(0).
    first = torch.empty_like(like).exponential_(generator=generator)
    return first - torch.empty_like(like).exponential_(generator=generator)
