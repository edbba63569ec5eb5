"""The predicted error of the private input, and its closed form from a spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.influence.damping import Damping, RelativeTo, resolvent
from leaklib.influence.spectrum import Spectrum

# A pixel whose share of the hidden directions is below this sees none of them: eigenvectors carry
# rounding of 1e-16, more where the eigenvalues next to the hidden ones are small.
HIDDEN_SHARE = 1e-10


@dataclass(frozen=True)
class Influence:
    """The predicted error of the private input, for every victim, perturbation and damping.

    Attributes:
        vector: (JJᵀ + εI)⁻¹Jδ, (victims, vectors, dampings, batch, *shape of one input): the error
            image, in the unit of the input.
        norm: I_ε = ‖vector‖, (victims, vectors, dampings).
        damping: absolute ε, (victims, dampings).
        projected_norm: ‖Jδ‖, (victims, vectors).
        residual: ‖Jδ − (JJᵀ + εI) vector‖ / ‖Jδ‖, like `norm`; 0 for the closed form.
        converged: whether the residual reached the tolerance, like `norm`; for the closed form
            whether the prediction is finite.
        products: products with JJᵀ that were spent, (victims, vectors).
    """

    vector: Tensor
    norm: Tensor
    damping: Tensor
    projected_norm: Tensor
    residual: Tensor
    converged: Tensor
    products: Tensor

    @property
    def rmse(self) -> Tensor:
        """I_ε/√d, the root mean squared error per entry of the input, like `norm`."""
        return self.norm / math.sqrt(math.prod(self.vector.shape[3:]))

    @property
    def error_bound(self) -> Tensor:
        """Largest distance of `vector` from the exact one: residual · ‖Jδ‖ / ε, like `norm`.

        Infinite without damping, where a small residual says nothing about the small eigenvalues;
        0 for the closed form.
        """
        left = self.residual * self.projected_norm[:, :, None]
        return (left / self.damping[:, None, :].to(left)).where(left != 0, 0.0)


def predicted_error(
    spectrum: Spectrum,
    projected: Tensor,
    *,
    damping: Damping = 1.0,
    relative_to: RelativeTo = None,
) -> Influence:
    """I²F in closed form from Jδ: U diag(1/(λ + ε)) Uᵀ Jδ, exact for every ε.

    Args:
        spectrum: of JJᵀ.
        projected: Jδ, (victims, vectors, d), as from `InfluenceOperator.jv` or
            `sample_projected_noise`.
        damping: ε >= 0, one or several.
        relative_to: "lambda_max" takes the damping as a share of each victim's largest eigenvalue.

    Returns:
        Influence in float64. Where JJᵀ + εI is singular up to rounding the norm is infinite, and
        so is every entry of the vector that takes part in a hidden direction; the other entries
        are exact.

    Raises:
        ValueError: Jδ of another shape or not finite, or a bad damping.

    Warns:
        RankWarning: JJᵀ + εI is singular up to rounding.

    With J = [[2, 1], [1, 2]] and δ = (1, 1): Jδ = (3, 3), λ = 9, so I₀ = √18/9 and I₉ = √18/18.

    >>> from leaklib.influence import spectrum_of_gram
    >>> two = spectrum_of_gram(torch.tensor([[[5.0, 4.0], [4.0, 5.0]]], dtype=torch.float64))
    >>> answer = predicted_error(two, torch.tensor([[[3.0, 3.0]]]), damping=[0.0, 9.0])
    >>> (answer.norm.flatten() * 18**0.5).round(decimals=9)
    tensor([2., 1.], dtype=torch.float64)
    """
    expected = (spectrum.victims, spectrum.unknowns)
    if projected.ndim != 3 or (projected.shape[0], projected.shape[2]) != expected:
        raise ValueError(
            f"expected Jδ of shape (victims, vectors, d) = ({expected[0]}, vectors, {expected[1]}),"
            f" got {tuple(projected.shape)}"
        )
    projected = check_finite(projected.to(spectrum.vectors))
    inverse, eps = resolvent(spectrum, damping, relative_to)  # (victims, dampings, d)
    hidden = inverse.isinf()
    coefficients = projected @ spectrum.vectors  # (victims, vectors, d)
    seen = coefficients[:, :, None] * inverse.where(~hidden, 0.0)[:, None]
    vector = seen @ spectrum.vectors.mT[:, None]
    norm = torch.linalg.vector_norm(seen, dim=-1)
    if bool(hidden.any()):
        share = hidden_share(spectrum, hidden)[:, None].expand_as(vector)
        vector = vector.where(share <= HIDDEN_SHARE, torch.inf)
        norm = norm.where(~hidden.any(-1)[:, None], torch.inf)
    return Influence(
        vector=vector.unflatten(-1, spectrum.input_shape),
        norm=norm,
        damping=eps,
        projected_norm=torch.linalg.vector_norm(projected, dim=-1),
        residual=torch.zeros_like(norm),
        converged=norm.isfinite(),
        products=torch.zeros(norm.shape[:2], dtype=torch.int64, device=norm.device),
    )


def hidden_share(spectrum: Spectrum, hidden: Tensor) -> Tensor:
    """Share of each entry of the input in hidden directions, Σ_i U_ji² over the hidden i.

    Args:
        spectrum: of JJᵀ.
        hidden: (victims, ..., d), which directions are hidden.

    Returns:
        Numbers in [0, 1], shaped like `hidden`.
    """
    return hidden.to(spectrum.vectors) @ spectrum.vectors.square().mT


def check_finite(projected: Tensor) -> Tensor:
    """Jδ as it is.

    Raises:
        ValueError: inf or NaN in it.
    """
    if not bool(projected.isfinite().all()):
        raise ValueError("expected a finite Jδ, got inf or NaN; check the perturbation δ")
    return projected
