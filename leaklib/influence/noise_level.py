"""The inverse use of I²F: how much noise makes the best attacker fail by as much as wanted."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from leaklib.influence.checks import RankWarning
from leaklib.influence.damping import RelativeTo
from leaklib.influence.expectation import checked_std, noise_gain
from leaklib.influence.spectrum import Spectrum


def noise_std_for_error(
    spectrum: Spectrum,
    *,
    rmse: float | Tensor,
    damping: float = 0.0,
    relative_to: RelativeTo = None,
) -> Tensor:
    """Standard deviation s of Gaussian gradient noise at which √(E[I_ε²]/d) reaches `rmse`.

    s = rmse √d / √(Σ_i λ_i/(λ_i + ε)²), linear in the target.

    A prediction of the linearised attack: far from 0, where a real attack's error saturates, it is
    an extrapolation. With damping, s is larger than without: the damped prediction is too small
    along the directions that leak least.

    Args:
        spectrum: of JJᵀ.
        rmse: root mean squared error per entry of the input, in its unit (normalised inputs count
            in normalised units); one number or (victims,).
        damping: ε >= 0.
        relative_to: "lambda_max" takes the damping as a share of λ_max.

    Returns:
        s, (victims,), float64: 0 where an undamped JJᵀ is singular, for the attack is undetermined
        there without any noise, and infinite where no noise reaches the input (J = 0, damped).

    Raises:
        ValueError: a target or damping that is negative or not finite.

    Warns:
        RankWarning: JJᵀ + εI is singular up to rounding, or J = 0.

    Source: Zhang et al. 2023, Eq. 4, solved for the noise.

    Two pixels with σ = 3 and 1: E[I₀²] = s² 10/9 = 2 rmse².

    >>> from leaklib.influence import spectrum_of_gram
    >>> two = spectrum_of_gram(torch.tensor([[[5.0, 4.0], [4.0, 5.0]]], dtype=torch.float64))
    >>> noise_std_for_error(two, rmse=5**0.5).round(decimals=9)
    tensor([3.], dtype=torch.float64)
    """
    device = spectrum.eigenvalues.device
    target = checked_std(rmse, victims=spectrum.victims, device=device)
    target = target * math.sqrt(spectrum.unknowns)
    gain = noise_gain(spectrum, damping, relative_to).sum(1).sqrt()
    if bool((gain == 0).any()):
        warnings.warn(
            f"J = 0 for {int((gain == 0).sum())} of {spectrum.victims} victims: the gradient says "
            "nothing about the input and no noise changes that; the noise level is infinite",
            RankWarning,
            stacklevel=2,
        )
        return (target / gain).where(gain != 0, torch.inf)
    return target / gain
