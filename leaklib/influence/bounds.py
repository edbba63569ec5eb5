"""Bounds of I²F, from below and from above; the cheap one needs one product and one eigenvalue.

With σ the singular values of J and λ = σ² the eigenvalues of JJᵀ,

    ‖Jδ‖/(λ_max + ε)  <=  I_ε(δ)  <=  ‖Jδ‖/(λ_min + ε),
                          I_ε(δ)  <=  ‖δ‖ max σ/(σ² + ε)  <=  ‖δ‖/(2√ε).

They bound the linearised error, as a norm over the whole input: divide by √d for the error per
entry. The undivided bound may exceed the RMSE, and the error of a real attack may be smaller than
either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.influence.checks import RankWarning, parameter_vectors
from leaklib.influence.damping import ConvergenceWarning
from leaklib.influence.expectation import checked_std
from leaklib.influence.lanczos import extreme_eigenvalues
from leaklib.influence.operator import InfluenceOperator


@dataclass(frozen=True)
class LowerBound:
    """Lower bound of I²F for every victim and perturbation.

    Attributes:
        value: ‖Jδ‖/(λ_max + ε), (victims, vectors), in the unit of the input.
        projected_norm: ‖Jδ‖, (victims, vectors).
        lambda_max: λ_max of JJᵀ, (victims,).
        error: (victims,), bound of the error of `lambda_max`, absolute.
        products: products with JJᵀ that λ_max took, (victims,).
        converged: (victims,), whether λ_max reached its tolerance.
    """

    value: Tensor
    projected_norm: Tensor
    lambda_max: Tensor
    error: Tensor
    products: Tensor
    converged: Tensor


def i2f_lower_bound(
    operator: InfluenceOperator,
    perturbation: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    damping: float = 0.0,
    tolerance: float = 1e-4,
    max_products: int = 100,
) -> LowerBound:
    """The cheap bound I_lb(δ) = ‖Jδ‖/(λ_max + ε), with λ_max by Lanczos in input space.

    λ_max does not depend on δ: pass all perturbations of a victim at once.

    Cost: one product Jδ each, and 8 to 11 products with JJᵀ where λ_max stands apart: 23 to 31
    gradient evaluations of multiplications; in time a product takes 3 to 5 instead of 2.7.

    Args:
        operator: J of each victim.
        perturbation: δ, parameter name -> (victims, *shape) or (victims, vectors, *shape).
        generator: of the starting vectors.
        damping: ε >= 0 of the I_ε that is bounded; the published bound has none.
        tolerance: relative accuracy of λ_max.
        max_products: limit of the search, in products with JJᵀ.

    Returns:
        LowerBound. Lanczos finds λ_max from below, so the value is too large, if anything: by a
        relative `error`/`lambda_max`, provided that the eigenvalue found is the largest, as it is
        from almost every start; and by about the square of that where λ_max stands apart.

    Raises:
        ValueError: a δ that does not fit or is not finite, or a bad damping.

    Warns:
        ConvergenceWarning: λ_max missed its tolerance.
        RankWarning: J = 0 and no damping; the value is then infinite.

    Source: Zhang et al. 2023, Eq. 5.
    """
    projected = operator.jv(perturbation)
    if not bool(projected.isfinite().all()):
        raise ValueError("expected a finite Jδ, got inf or NaN; check the perturbation δ")
    norm = torch.linalg.vector_norm(projected, dim=-1, dtype=torch.float64)
    found = extreme_eigenvalues(
        operator.gram_product, victims=operator.victims, d=operator.unknowns, generator=generator,
        dtype=operator.dtype, device=operator.device, tolerance=tolerance,
        max_products=max_products,
    )  # fmt: skip
    if not bool(found.converged.all()):
        warnings.warn(
            f"Lanczos missed its tolerance {tolerance:g} for {int((~found.converged).sum())} of "
            f"{operator.victims} victims after {max_products} products: λ_max may be larger and "
            "the bound smaller; raise max_products",
            ConvergenceWarning,
            stacklevel=2,
        )
    return LowerBound(
        value=lower_bound(norm, found.largest, damping=damping),
        projected_norm=norm,
        lambda_max=found.largest,
        error=found.largest_error,
        products=found.products,
        converged=found.converged,
    )


def lower_bound(projected_norm: Tensor, lambda_max: Tensor, *, damping: float = 0.0) -> Tensor:
    """‖Jδ‖/(λ_max + ε) <= I_ε(δ).

    Args:
        projected_norm: ‖Jδ‖, (victims, ...).
        lambda_max: (victims,).
        damping: ε >= 0. Bound I_ε with the same ε: ‖Jδ‖/λ_max alone is no bound of it.

    Returns:
        Like `projected_norm`; infinite where λ_max + ε = 0.

    Raises:
        ValueError: a damping that is negative or not finite.

    Source: Zhang et al. 2023, Eq. 5, there without ε.

    With J = [[2, 1], [1, 2]] and δ = (1, 0): ‖Jδ‖ = √5 and λ_max = 9.

    >>> round(lower_bound(torch.tensor([[5.0]]).sqrt(), torch.tensor([9.0])).item(), 4)  # √5/9
    0.2485
    """
    return _quotient(projected_norm, lambda_max, damping)


def upper_bound(projected_norm: Tensor, lambda_min: Tensor, *, damping: float = 0.0) -> Tensor:
    """I_ε(δ) <= ‖Jδ‖/(λ_min + ε).

    Args:
        projected_norm: ‖Jδ‖, (victims, ...).
        lambda_min: (victims,); 0 is always right, and is all there is where d exceeds p.
        damping: ε >= 0.

    Returns:
        Like `projected_norm`; infinite where λ_min + ε = 0.

    Raises:
        ValueError: a damping that is negative or not finite.

    >>> upper_bound(torch.tensor([[3.0]]), torch.tensor([1.0]), damping=0.5)
    tensor([[2.]])
    """
    return _quotient(projected_norm, lambda_min, damping)


def perturbation_upper_bound(
    perturbation_norm: Tensor,
    *,
    damping: float = 0.0,
    sigma_min: Tensor | float = 0.0,
    sigma_max: Tensor | float = math.inf,
) -> Tensor:
    """I_ε(δ) <= ‖δ‖ max σ/(σ² + ε) over σ_min <= σ <= σ_max.

    The maximum lies at the σ of that range nearest to √ε: without knowledge of J it is ‖δ‖/(2√ε),
    and without damping ‖δ‖/σ_min.

    Args:
        perturbation_norm: ‖δ‖, (victims, ...).
        damping: ε >= 0.
        sigma_min: smallest singular value of J, (victims,), or a lower bound of it.
        sigma_max: largest singular value of J, (victims,), or an upper bound of it.

    Returns:
        Like `perturbation_norm`; infinite where ε = 0 and σ_min = 0.

    Raises:
        ValueError: a damping that is negative or not finite, or σ_min > σ_max.

    >>> perturbation_upper_bound(torch.tensor([[3.0]]), damping=0.25).item()
    3.0
    >>> perturbation_upper_bound(torch.tensor([[3.0]]), sigma_min=1.5).round(decimals=9).item()
    2.0
    """
    _check_damping(damping)
    low = torch.as_tensor(sigma_min, dtype=torch.float64, device=perturbation_norm.device)
    high = torch.as_tensor(sigma_max, dtype=torch.float64, device=perturbation_norm.device)
    if bool((low < 0).any()) or bool((low > high).any()):
        raise ValueError(f"expected 0 <= sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    low, high = low.expand(len(perturbation_norm)), high.expand(len(perturbation_norm))
    worst = torch.full_like(low, math.sqrt(damping)).clamp(low, high)
    # σ/(σ² + ε) written so that neither a tiny nor a huge σ² leaves the range of floats
    factor = 1 / (worst + damping / worst) if damping else 1 / worst
    factor = _column(factor, perturbation_norm)
    return (perturbation_norm * factor).where(factor.isfinite(), torch.inf)


def expected_lower_bound(
    trace: Tensor, lambda_max: Tensor, *, std: float | Tensor, damping: float = 0.0
) -> Tensor:
    """√E[I_lb²] = √(s² tr JJᵀ)/(λ_max + ε) for Gaussian noise δ ~ N(0, s²I).

    Args:
        trace: tr JJᵀ, (victims,): `Spectrum.trace`, or a stochastic estimate for a large input.
        lambda_max: (victims,).
        std: s, standard deviation of the noise on every entry of the gradient; one for all victims
            or (victims,).
        damping: ε >= 0.

    Returns:
        (victims,), in the unit of the input.

    Raises:
        ValueError: a standard deviation or damping that is negative or not finite.

    With J = [[2, 1], [1, 2]]: tr JJᵀ = 10 and λ_max = 9.

    >>> ten, nine = torch.tensor([10.0]), torch.tensor([9.0])
    >>> round(expected_lower_bound(ten, nine, std=1.0).item(), 4)  # √10/9
    0.3514
    """
    s = checked_std(std, victims=len(trace), device=trace.device)
    return _quotient(s * trace.sqrt(), lambda_max, damping)


def perturbation_norm(operator: InfluenceOperator, perturbation: Mapping[str, Tensor]) -> Tensor:
    """‖δ‖ over all shared parameters.

    Args:
        operator: tells a vectors axis from a parameter's own.
        perturbation: δ, parameter name -> (victims, *shape) or (victims, vectors, *shape).

    Returns:
        (victims, vectors), float64.

    Raises:
        ValueError: other names or shapes.
    """
    vectors = parameter_vectors(
        perturbation,
        shapes=operator.parameter_shapes,
        victims=operator.victims,
        like=torch.empty(0, dtype=torch.float64, device=operator.device),
    )
    squares = [one.square().flatten(2).sum(2) for one in vectors.values()]
    return torch.stack(squares).sum(0).sqrt()


def _quotient(norm: Tensor, eigenvalue: Tensor, damping: float) -> Tensor:
    """norm/(λ + ε), infinite where the denominator is 0."""
    _check_damping(damping)
    total = _column(eigenvalue.to(norm.device) + damping, norm)
    if bool((total <= 0).any()):
        warnings.warn(
            f"λ + ε = 0 for {int((total <= 0).sum())} of {len(total)} victims: some direction of "
            "the input leaves no trace in the gradient, and the bound is infinite; take a damping "
            "> 0 to ignore it",
            RankWarning,
            stacklevel=3,
        )
    return (norm / total).where(total > 0, torch.inf)


def _column(per_victim: Tensor, like: Tensor) -> Tensor:
    """(victims,) -> (victims, 1, ...) with the dimensions of `like`."""
    return per_victim.view(-1, *[1] * (like.ndim - 1))


def _check_damping(damping: float) -> None:
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"expected a finite damping >= 0, got {damping}")
