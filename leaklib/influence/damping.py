"""The damping ε of (JJᵀ + εI)⁻¹: absolute or relative to λ_max, one number or several."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from leaklib.influence.checks import RankWarning
from leaklib.influence.spectrum import Spectrum

Damping = float | Sequence[float]
RelativeTo = Literal["lambda_max"] | None


class ConvergenceWarning(UserWarning):
    """An iterative solver misses its tolerance, or its residual guarantees too little."""


def absolute_damping(
    damping: Damping, *, lambda_max: Tensor | None, victims: int, device: torch.device | str
) -> Tensor:
    """Damping of every victim: ε = damping, or ε = damping · λ_max.

    Args:
        damping: one number or several, each >= 0 and finite.
        lambda_max: (victims,), the eigenvalue that the damping is relative to; None: absolute.
        victims: number of victims.
        device: of the answer.

    Returns:
        ε, (victims, dampings), float64, in the unit of JJᵀ.

    Raises:
        ValueError: no damping, or one that is negative or not finite.

    >>> absolute_damping([0.1, 1.0], lambda_max=torch.tensor([9.0]), victims=1, device="cpu")
    tensor([[0.9000, 9.0000]], dtype=torch.float64)
    """
    values = torch.atleast_1d(torch.as_tensor(damping, dtype=torch.float64, device=device))
    if values.ndim != 1 or not len(values) or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(
            f"expected a damping >= 0, or a list of them, got {damping}; 0 is the undamped I²F, "
            "and relative_to='lambda_max' makes it a share of the largest eigenvalue"
        )
    if lambda_max is None:
        return values.expand(victims, -1)
    return values * lambda_max.to(values)[:, None]


def check_relative(relative_to: RelativeTo) -> bool:
    """Whether the damping is relative.

    Raises:
        ValueError: neither None nor "lambda_max".
    """
    if relative_to not in (None, "lambda_max"):
        raise ValueError(
            f"expected relative_to=None (absolute) or 'lambda_max', got {relative_to!r}"
        )
    return relative_to is not None


def resolvent(
    spectrum: Spectrum, damping: Damping, relative_to: RelativeTo
) -> tuple[Tensor, Tensor]:
    """1/(λ + ε) for every damping, infinite where the rounding hides λ + ε.

    An undamped direction with λ = 0 leaves no trace in the gradient: the attacker cannot know it,
    whatever the noise. The computed λ is then rounding error, and dividing by it gives a finite
    number without meaning.

    Returns:
        1/(λ + ε), (victims, dampings, d), and ε, (victims, dampings).

    Raises:
        ValueError: a damping that is negative or not finite.
    """
    eps = absolute_damping(
        damping, lambda_max=spectrum.largest if check_relative(relative_to) else None,
        victims=spectrum.victims, device=spectrum.eigenvalues.device,
    )  # fmt: skip
    total = spectrum.eigenvalues[:, None, :] + eps[:, :, None]
    hidden = total <= spectrum.resolution[:, None, None]
    if bool(hidden.any()):
        counts = hidden.any(1).sum(1)
        warnings.warn(
            f"JJᵀ is singular up to rounding and the damping does not cover it: victim "
            f"{int(counts.argmax())} has {int(counts.max())} of {spectrum.unknowns} directions "
            "that leave no trace in the gradient. Along them the prediction is infinite; take a "
            "damping > 0 to ignore them",
            RankWarning,
            stacklevel=3,
        )
    return (1 / total).where(~hidden, torch.inf), eps
