"""I²F under Gaussian noise, in closed form from the spectrum: how large, along what, and where.

Noise δ ~ N(0, s²I) on the gradient reaches the input through J alone: Jδ ~ N(0, s²JJᵀ) lives in the
space of the input, and the predicted error (JJᵀ + εI)⁻¹Jδ has covariance s² U diag(λ/(λ+ε)²) Uᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from leaklib.influence.damping import RelativeTo, resolvent
from leaklib.influence.operator import InfluenceOperator
from leaklib.influence.prediction import HIDDEN_SHARE, hidden_share
from leaklib.influence.spectrum import Spectrum, check_indices
from leaklib.influence.trace import Estimate, trace_of_function


def expected_square(
    spectrum: Spectrum,
    *,
    std: float | Tensor,
    damping: float = 0.0,
    relative_to: RelativeTo = None,
) -> Tensor:
    """E[I_ε²] = s² Σ_i λ_i/(λ_i + ε)² for δ ~ N(0, s²I); without damping s² Σ_i 1/λ_i.

    Args:
        spectrum: of JJᵀ.
        std: s, standard deviation on every entry of the gradient; one number or (victims,).
        damping: ε >= 0.
        relative_to: "lambda_max" takes the damping as a share of λ_max.

    Returns:
        (victims,), float64, in the squared unit of the input; √(E[I²]/d) is the RMSE per entry.
        Infinite where JJᵀ + εI is singular up to rounding.

    Raises:
        ValueError: a standard deviation or damping that is negative or not finite.

    Warns:
        RankWarning: JJᵀ + εI is singular up to rounding.

    Source: Zhang et al. 2023, Eq. 4, with E[δδᵀ] = s²I.

    Two pixels with σ = 3 and 1: E[I₀²] = s² (1/9 + 1).

    >>> from leaklib.influence import spectrum_of_gram
    >>> two = spectrum_of_gram(torch.tensor([[[5.0, 4.0], [4.0, 5.0]]], dtype=torch.float64))
    >>> expected_square(two, std=3.0).round(decimals=9)
    tensor([10.], dtype=torch.float64)
    """
    s = _std(std, spectrum)
    return _scaled(noise_gain(spectrum, damping, relative_to).sum(1), s**2)


def expected_square_estimate(
    operator: InfluenceOperator,
    *,
    std: float | Tensor,
    damping: float,
    generator: torch.Generator,
    samples: int = 16,
    steps: int = 40,
) -> Estimate:
    """`expected_square` without a spectrum: s² tr[K(K + εI)⁻²] by stochastic Lanczos quadrature.

    For inputs too large to decompose JJᵀ. The smaller the damping against λ_max, the more steps:
    look at both errors of the estimate.

    Cost: samples · steps products with JJᵀ, about 2.7 gradient evaluations of multiplications each
    (3 to 5 in time).

    Args:
        operator: J of each victim.
        std: s, standard deviation on every entry of the gradient; one number or (victims,).
        damping: ε > 0, absolute.
        generator: of the random vectors.
        samples: random vectors, which bring the standard error down with their root.
        steps: Lanczos steps of each.

    Returns:
        Estimate, in the squared unit of the input.

    Raises:
        ValueError: a damping that is not above 0, where the smallest eigenvalues decide and no
            quadrature sees them; a bad standard deviation.
    """
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(
            f"expected a finite damping > 0, got {damping}; undamped, the smallest eigenvalues "
            "decide: take expected_square of a spectrum"
        )
    s = checked_std(std, victims=operator.victims, device=operator.device)
    found = trace_of_function(
        operator.gram_product, lambda value: value / (value + damping) ** 2,
        victims=operator.victims, d=operator.unknowns, generator=generator, samples=samples,
        steps=steps, dtype=operator.dtype, device=operator.device,
    )  # fmt: skip
    return replace(
        found,
        mean=s**2 * found.mean,
        standard_error=s**2 * found.standard_error,
        quadrature_error=s**2 * found.quadrature_error,
    )


def direction_error(
    spectrum: Spectrum,
    indices: Sequence[int],
    *,
    scale: float,
    damping: float = 0.0,
    relative_to: RelativeTo = None,
) -> Tensor:
    """Predicted mean squared error per entry for δ = α v_i: α² λ_i/((λ_i + ε)² d) = α²/(d σ_i²).

    Args:
        spectrum: of JJᵀ.
        indices: places in the descending order of σ.
        scale: α, the norm of the perturbation.
        damping: ε >= 0.
        relative_to: "lambda_max" takes the damping as a share of λ_max.

    Returns:
        (victims, len(indices)), float64, in the squared unit of the input.

    Raises:
        ValueError: an index outside the spectrum, or a bad scale or damping.

    Warns:
        RankWarning: JJᵀ + εI is singular up to rounding.

    Source: Zhang et al. 2023, Fig. 5, whose axis "λ" is σ.

    >>> from leaklib.influence import spectrum_of_gram
    >>> two = spectrum_of_gram(torch.tensor([[[5.0, 4.0], [4.0, 5.0]]], dtype=torch.float64))
    >>> direction_error(two, [0, 1], scale=6.0).round(decimals=9)
    tensor([[ 2., 18.]], dtype=torch.float64)
    """
    chosen = check_indices(spectrum, indices)
    alpha = _std(scale, spectrum)[:, None]
    gain = noise_gain(spectrum, damping, relative_to)[:, chosen]
    return _scaled(gain, alpha**2) / spectrum.unknowns


def sensitivity_map(
    spectrum: Spectrum,
    *,
    std: float | Tensor,
    damping: float = 0.0,
    relative_to: RelativeTo = None,
) -> Tensor:
    """Where the leak is: s √diag(U diag(λ/(λ+ε)²) Uᵀ), the predicted error of each entry.

    The standard deviation of the predicted error under δ ~ N(0, s²I). Its squares sum to E[I_ε²].
    Undamped, a small value is an entry that the gradient gives away. Damped, an entry that the
    gradient hardly depends on is small as well: its directions are switched off.

    Args:
        spectrum: of JJᵀ.
        std: s, standard deviation on every entry of the gradient; one number or (victims,).
        damping: ε >= 0.
        relative_to: "lambda_max" takes the damping as a share of λ_max.

    Returns:
        (victims, batch, *shape of one input), float64, in the unit of the input. Infinite at the
        entries that an undamped direction with λ = 0 touches, exact at the others.

    Raises:
        ValueError: a standard deviation or damping that is negative or not finite.

    Warns:
        RankWarning: JJᵀ + εI is singular up to rounding.

    Two pixels seen alike: each carries half of E[I₀²] = 10/9.

    >>> from leaklib.influence import spectrum_of_gram
    >>> two = spectrum_of_gram(torch.tensor([[[5.0, 4.0], [4.0, 5.0]]], dtype=torch.float64))
    >>> sensitivity_map(two, std=3.0).square().round(decimals=9)
    tensor([[[5., 5.]]], dtype=torch.float64)
    """
    s = _std(std, spectrum)
    gain = noise_gain(spectrum, damping, relative_to)
    hidden = gain.isinf()
    variance = (spectrum.vectors.square() @ gain.where(~hidden, 0.0)[:, :, None])[:, :, 0]
    untouched = hidden_share(spectrum, hidden[:, None])[:, 0] <= HIDDEN_SHARE
    answer = _scaled(variance.where(untouched, torch.inf).sqrt(), s[:, None])
    return answer.unflatten(1, spectrum.input_shape)


def sample_projected_noise(
    spectrum: Spectrum, *, std: float | Tensor, draws: int, generator: torch.Generator
) -> Tensor:
    """Draws of Jδ for δ ~ N(0, s²I), in the space of the input: s U diag(σ) z with z ~ N(0, I).

    Distributed as Jδ itself, without a vector of parameter size: d² instead of one product with J.

    Args:
        spectrum: of JJᵀ.
        std: s, standard deviation on every entry of the gradient; one number or (victims,).
        draws: number of draws for every victim.
        generator: source of z, drawn on its own device.

    Returns:
        (victims, draws, d), float64, for `predicted_error`.

    Raises:
        ValueError: a bad standard deviation, or draws < 1.

    >>> from leaklib.influence import spectrum_of_gram
    >>> two = spectrum_of_gram(torch.tensor([[[5.0, 4.0], [4.0, 5.0]]], dtype=torch.float64))
    >>> noise = sample_projected_noise(two, std=0.0, draws=1, generator=torch.Generator())
    >>> noise.abs()
    tensor([[[0., 0.]]], dtype=torch.float64)
    """
    if draws < 1:
        raise ValueError(f"expected draws >= 1, got {draws}")
    s = _std(std, spectrum)
    z = torch.randn(
        spectrum.victims, draws, spectrum.unknowns, generator=generator, dtype=torch.float64,
        device=generator.device,
    ).to(spectrum.vectors)  # fmt: skip
    return s[:, None, None] * (z * spectrum.singular_values[:, None]) @ spectrum.vectors.mT


def noise_gain(spectrum: Spectrum, damping: float, relative_to: RelativeTo) -> Tensor:
    """λ_i/(λ_i + ε)², (victims, d): predicted error variance along u_i for unit noise.

    Infinite where the rounding hides λ_i + ε.

    Raises:
        ValueError: several dampings, or one that is negative or not finite.
    """
    inverse, eps = resolvent(spectrum, damping, relative_to)
    if eps.shape[1] != 1:
        raise ValueError(f"expected one damping, got {eps.shape[1]}; call once for each")
    inverse = inverse[:, 0]
    return (spectrum.eigenvalues * inverse.square()).where(inverse.isfinite(), torch.inf)


def _scaled(gain: Tensor, scale: Tensor) -> Tensor:
    """Scale · gain; infinite where the gain is: what leaves no trace is unknown without noise."""
    return (scale * gain).where(gain.isfinite(), torch.inf)


def checked_std(std: float | Tensor, *, victims: int, device: torch.device | str) -> Tensor:
    """A standard deviation or scale for every victim, (victims,), float64.

    Raises:
        ValueError: negative, not finite, or of another number of victims.
    """
    given = torch.as_tensor(std, dtype=torch.float64, device=device)
    if given.ndim > 1 or (given.ndim == 1 and len(given) not in (1, victims)):
        raise ValueError(
            f"expected one number or {victims} of them, one per victim, got shape "
            f"{tuple(given.shape)}"
        )
    if not bool(((given >= 0) & given.isfinite()).all()):
        raise ValueError(f"expected a standard deviation or scale >= 0 and finite, got {std}")
    return given.expand(victims)


def _std(std: float | Tensor, spectrum: Spectrum) -> Tensor:
    return checked_std(std, victims=spectrum.victims, device=spectrum.eigenvalues.device)
