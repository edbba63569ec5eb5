"""Eigenvalues and singular vectors of the Jacobian J = ∂(∇θ L)/∂x, through K = JJᵀ in float64.

With J = U Σ Vᵀ and λ = σ², one decomposition gives I²F for every damping ε and every perturbation
δ, its expectation under noise, its bounds and the map of where in the input the leak is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from leaklib.influence.checks import RankWarning
from leaklib.influence.gram import gram_matrix
from leaklib.influence.operator import InfluenceOperator, influence_operator

# Above this size one decomposition fills the machine; the workspace of all of them would not fit.
BATCHED_EIGH = 256

# Rounding of K reaches a few units in the last place of λ_max, and grows with its size.
ROUNDING_UNITS = 8


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues λ₁ >= λ₂ >= ... of K = JJᵀ and its eigenvectors, the left singular vectors of J.

    Attributes:
        eigenvalues: λ, (victims, d), descending, float64, >= 0.
        vectors: U, (victims, d, d); column i is u_i, of norm 1, the input direction with λ_i.
        input_shape: (batch, *shape of one input); its product is d.
        rounding: (victims,), the largest negative eigenvalue that was clipped to 0, as a magnitude.
        resolution: (victims,), the level up to which an eigenvalue is rounding error.
    """

    eigenvalues: Tensor
    vectors: Tensor
    input_shape: tuple[int, ...]
    rounding: Tensor
    resolution: Tensor

    @property
    def victims(self) -> int:
        """Number of victims."""
        return self.eigenvalues.shape[0]

    @property
    def unknowns(self) -> int:
        """Entries d of the private input."""
        return self.eigenvalues.shape[1]

    @property
    def singular_values(self) -> Tensor:
        """σ = √λ of J, (victims, d), descending."""
        return self.eigenvalues.sqrt()

    @property
    def largest(self) -> Tensor:
        """λ_max, (victims,)."""
        return self.eigenvalues[:, 0]

    @property
    def smallest(self) -> Tensor:
        """λ_min, (victims,); 0 where it is not above the rounding."""
        return self.eigenvalues[:, -1].where(self.rank() == self.unknowns, 0.0)

    @property
    def trace(self) -> Tensor:
        """Trace of JJᵀ = Σ λ, (victims,)."""
        return self.eigenvalues.sum(1)

    @property
    def condition(self) -> Tensor:
        """λ_max / λ_min of K, the square of that of J, (victims,); inf where K is singular."""
        full = self.rank() == self.unknowns
        return (self.largest / self.eigenvalues[:, -1]).where(full, torch.inf)

    def rank(self, tolerance: float | None = None) -> Tensor:
        """Number of eigenvalues above tolerance · λ_max; None: above the rounding; (victims,)."""
        level = self.resolution if tolerance is None else tolerance * self.largest
        return (self.eigenvalues > level[:, None]).sum(1)

    def select(self, rows: Sequence[int] | Tensor | slice) -> Spectrum:
        """The spectrum of some victims."""
        rows = torch.as_tensor(rows) if isinstance(rows, Sequence) else rows
        return Spectrum(
            self.eigenvalues[rows], self.vectors[rows], self.input_shape, self.rounding[rows],
            self.resolution[rows],
        )  # fmt: skip


def spectrum(
    operator: InfluenceOperator, *, method: Literal["auto", "ghost", "dense"] = "auto"
) -> Spectrum:
    """Full spectrum of JJᵀ, in float64 whatever the dtype of the operator.

    Cost: d rows of K, 2/3 to 4/3 gradient evaluations each, and one d³ decomposition per victim;
    d² numbers of memory per victim, twice. For d up to about 4000.

    Args:
        operator: J of each victim.
        method: how `gram_matrix` builds K.

    Returns:
        Spectrum of every victim.

    Raises:
        ValueError: K is not finite.
    """
    gram = gram_matrix(in_float64(operator), method=method)
    return spectrum_of_gram(gram, input_shape=operator.input_shape)


def spectrum_of_gram(gram: Tensor, *, input_shape: Sequence[int] | None = None) -> Spectrum:
    """Spectrum of K = JJᵀ that is already there.

    Args:
        gram: K, (victims, d, d), symmetric, positive semidefinite up to the rounding of its dtype.
        input_shape: (batch, *shape of one input) with product d; None is (1, d).

    Returns:
        Spectrum, float64.

    Raises:
        ValueError: K not square, not finite, not symmetric, with an eigenvalue below 0 that no
            rounding explains, or of another size than the input.

    Two pixels, J = [[2, 1], [1, 2]]: the sum of the two is seen three times as well as their
    difference.

    >>> two = spectrum_of_gram(torch.tensor([[[5.0, 4.0], [4.0, 5.0]]], dtype=torch.float64))
    >>> two.eigenvalues.round(decimals=9)
    tensor([[9., 1.]], dtype=torch.float64)
    >>> two.singular_values.round(decimals=9)
    tensor([[3., 1.]], dtype=torch.float64)
    >>> round(two.condition.item(), 9), two.rank().item()
    (9.0, 2)
    """
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or not gram.numel():
        raise ValueError(
            f"expected K of shape (victims, d, d), got {tuple(gram.shape)}; one needs K[None]"
        )
    shape = tuple(input_shape) if input_shape is not None else (1, gram.shape[1])
    if prod(shape) != gram.shape[1]:
        raise ValueError(f"expected input_shape of {gram.shape[1]} entries, got {shape}")
    if not bool(gram.isfinite().all()):
        raise ValueError(
            "expected a finite K = JJᵀ, got inf or NaN; check the model's weights and the scale of "
            "the input: a loss that overflows has no Jacobian"
        )
    eps = torch.finfo(gram.dtype).eps * ROUNDING_UNITS * gram.shape[1]
    scale = gram.diagonal(dim1=1, dim2=2).abs().sum(1)
    if bool(((gram - gram.mT).abs().amax((1, 2)) > eps * scale).any()):
        raise ValueError("expected a symmetric K = JJᵀ; pass (K + Kᵀ)/2 if it is one up to noise")
    values, vectors = _decompose(gram.double())
    rounding = (-values[:, -1]).clamp_min(0.0)
    if bool((rounding > 1e3 * eps * values[:, 0].clamp_min(0.0)).any()):
        raise ValueError(
            f"expected a positive semidefinite K = JJᵀ, got an eigenvalue of {-rounding.max():.3g} "
            f"beside λ_max = {values[:, 0].max():.3g}; compute K in float64"
        )
    values = values.clamp_min(0.0)
    return Spectrum(values, vectors, shape, rounding, torch.maximum(eps * values[:, 0], rounding))


def singular_directions(
    operator: InfluenceOperator, spectrum: Spectrum, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Right singular vectors v_i = Jᵀu_i / σ_i: gradient perturbations of norm 1.

    Along v_i the predicted error of the input is u_i/σ_i, undamped: the larger i, the more it
    protects.

    Cost: one product Jᵀu per index, in float64.

    Args:
        operator: J of each victim.
        spectrum: its spectrum.
        indices: places in the descending order, 0 the largest σ; the same for all victims.

    Returns:
        Parameter name -> (victims, len(indices), *parameter shape), of the operator's dtype.

    Raises:
        ValueError: an index outside the spectrum, or one with σ_i = 0 up to rounding, along which
            J has no right singular vector.

    Source: Zhang et al. 2023, Fig. 5, whose axis "λ" is σ.
    """
    check_same_problem(operator, spectrum)
    chosen = check_indices(spectrum, indices)
    values = spectrum.eigenvalues[:, chosen]
    if bool((values <= spectrum.resolution[:, None]).any()):
        raise ValueError(
            f"expected indices below the rank, {spectrum.rank().tolist()} of the victims, got "
            f"{list(indices)}; a direction with σ = 0 leaves no trace in the gradient"
        )
    u = spectrum.vectors[:, :, chosen].mT  # (victims, k, d)
    back = in_float64(operator).jtu(u.to(operator.device))
    sigma = values.sqrt().to(operator.device)
    return {
        name: (one / sigma.view(*sigma.shape, *[1] * (one.ndim - 2))).to(operator.dtype)
        for name, one in back.items()
    }


def in_float64(operator: InfluenceOperator) -> InfluenceOperator:
    """The same operator in float64; itself where it is one."""
    if operator.dtype == torch.float64:
        return operator
    with warnings.catch_warnings():
        # p < d was said when the operator was made
        warnings.simplefilter("ignore", RankWarning)
        return influence_operator(
            operator.model, operator.inputs, operator.labels, loss=operator.loss,
            reduction=operator.reduction, layers=tuple(operator.parameter_shapes),
            form=operator.form, dtype=torch.float64, chunk=operator.chunk,
        )  # fmt: skip


def check_same_problem(operator: InfluenceOperator, spectrum: Spectrum) -> None:
    """Refuse the spectrum of other victims.

    Raises:
        ValueError: the numbers of victims or unknowns differ.
    """
    ours = (spectrum.victims, spectrum.unknowns)
    if ours != (operator.victims, operator.unknowns):
        raise ValueError(
            f"expected a spectrum of {operator.victims} victims with {operator.unknowns} unknowns, "
            f"got {ours}; call spectrum(operator) on this operator"
        )


def check_indices(spectrum: Spectrum, indices: Sequence[int]) -> Tensor:
    """Places in the descending spectrum as a tensor.

    Raises:
        ValueError: none, or one outside 0 ... d − 1.
    """
    chosen = torch.as_tensor(list(indices), device=spectrum.eigenvalues.device)
    if not len(chosen) or bool(((chosen < 0) | (chosen >= spectrum.unknowns)).any()):
        raise ValueError(
            f"expected indices from 0 (largest σ) to {spectrum.unknowns - 1}, got {list(indices)}"
        )
    return chosen


def _decompose(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, and eigenvectors in columns."""
    batch = len(gram) if gram.shape[1] <= BATCHED_EIGH else 1
    parts = [torch.linalg.eigh(part) for part in gram.split(batch)]
    values = torch.cat([part.eigenvalues for part in parts])
    return values.flip(1), torch.cat([part.eigenvectors for part in parts]).flip(2)
