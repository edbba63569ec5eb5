"""Losses of one logit, functions of the margin μ = y·logit with y = ±1, and what μ l'(μ) tells.

R-GAP's binary networks have one output. Its gradient with respect to the last weights gives the
single number μ l'(μ), from which the margin follows: at most two of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import lambertw
from torch import Tensor


@dataclass(frozen=True)
class MarginLoss:
    """A loss l(μ) of the margin μ = y·logit, y = 2t − 1 for the label t in {0, 1}.

    Called as a loss of the library: `loss(outputs, labels, reduction="mean")`. It derives twice and
    batches under `vmap`.

    Args:
        name: what it is called.
        value: l.
        slope: l', negative or zero.
        curvature: l''.
    """

    name: str
    value: Callable[[Tensor], Tensor] = field(repr=False)
    slope: Callable[[Tensor], Tensor] = field(repr=False)
    curvature: Callable[[Tensor], Tensor] = field(repr=False)

    def __call__(self, outputs: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
        """Mean or sum of l(y·logit) over a batch.

        Args:
            outputs: one logit an input, (batch, 1) or (batch,).
            labels: 0 or 1, integers (batch,); or probabilities of both, (batch, 2).
            reduction: "mean" or "sum".

        Returns:
            A scalar.

        Raises:
            ValueError: more than one logit, labels of another shape, or an unknown reduction.

        >>> LOGISTIC(torch.zeros(3, 1), torch.tensor([0, 1, 1]), reduction="sum") / math.log(2)
        tensor(3.)
        """
        logits = outputs.squeeze(1) if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs
        if logits.ndim != 1:
            raise ValueError(
                f"expected one logit an input, (batch, 1) or (batch,), got {tuple(outputs.shape)}; "
                "build the network with classes=1, or use cross-entropy"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
        soft = labels.is_floating_point()
        if labels.shape != ((len(logits), 2) if soft else logits.shape):
            raise ValueError(
                f"expected integer labels ({len(logits)},) or probabilities ({len(logits)}, 2), "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if soft:
            losses = labels[:, 0] * self.value(-logits) + labels[:, 1] * self.value(logits)
        else:
            losses = self.value((2 * labels.to(logits.dtype) - 1) * logits)  # uint8 would wrap
        return losses.mean() if reduction == "mean" else losses.sum()


# logsigmoid and not log(1 + exp): the latter overflows, and softplus is cut off at 20
LOGISTIC = MarginLoss(
    "logistic",
    value=lambda mu: -F.logsigmoid(mu),
    slope=lambda mu: -torch.sigmoid(-mu),
    curvature=lambda mu: torch.sigmoid(mu) * torch.sigmoid(-mu),
)
EXPONENTIAL = MarginLoss(
    "exponential",
    value=lambda mu: torch.exp(-mu),
    slope=lambda mu: -torch.exp(-mu),
    curvature=lambda mu: torch.exp(-mu),
)
HINGE = MarginLoss(
    "hinge",
    value=lambda mu: torch.relu(1 - mu),
    slope=lambda mu: -(mu < 1).to(mu.dtype),
    curvature=torch.zeros_like,
)

# name -> (μ, τ) where −μ l'(μ) is largest: d/dμ of it vanishes. For the logistic loss this says
# (μ − 1) exp(μ − 1) = 1/e, and then τ = μ − 1. The hinge stays below its bound.
_OMEGA = float(lambertw(math.exp(-1)).real)
_SUMMITS = {
    "logistic": (1 + _OMEGA, _OMEGA),
    "exponential": (1.0, math.exp(-1)),
    "hinge": (math.nextafter(1, 0), 1.0),
}


def largest_tau(loss: MarginLoss) -> float:
    """The supremum of τ = −μ l'(μ): W(1/e) = 0.278465 logistic, 1/e exponential, 1 hinge.

    Raises:
        ValueError: a loss whose summit is not known.

    >>> round(largest_tau(LOGISTIC), 6)
    0.278465
    """
    return _summit(loss)[1]


def margin_roots(loss: MarginLoss, tau: Tensor, *, tolerance: float = 1e-12) -> Tensor:
    """All margins μ with μ l'(μ) = −τ, smaller first.

        logistic      μ = τ − W(−τ eᵗᵃᵘ)
        exponential   μ = −W(−τ)
        hinge         μ = τ, τ < 1

    W is Lambert's function. A wrongly classified input, τ < 0, has one root (branch W₀). For
    0 < τ < `largest_tau` there are two (W₀ and W₋₁; one for the hinge), which meet at that largest
    τ; beyond it there is none. The roots are polished by Newton's method.
    Source: Zhu & Blaschko 2021 (R-GAP), Algorithm 1 and released code, which searches for one root;
    the closed forms are our derivation. Cost: negligible.

    Args:
        loss: one of LOGISTIC, EXPONENTIAL, HINGE.
        tau: (n,), −⟨∂L/∂w, w⟩ of a last layer w without bias.
        tolerance: by how much, relatively, τ may exceed its maximum and still count as rounding;
            the answer is then the double root.

    Returns:
        (n, 2), float64; NaN where there is no such root. The double root stands once.

    Raises:
        ValueError: a loss without a known closed form.

    >>> mu = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    >>> margin_roots(LOGISTIC, -mu * LOGISTIC.slope(mu))
    tensor([[-2.0000,     nan],
            [ 1.0000,  1.5969]], dtype=torch.float64)
    """
    summit, top = _summit(loss)
    tau = tau.double()
    excess = tau - top
    if loss.name == "hinge":
        roots = torch.stack([tau, torch.full_like(tau, torch.nan)], dim=1)
    else:
        roots = _lambert_roots(loss.name, tau)
        # the argument of W loses half its digits at the branch point, where
        # −μ l'(μ) = τ_max (1 − (μ − μ_max)² / (2 μ_max)) + ...
        step = (-2 * summit / top * excess).clamp(min=0).sqrt()
        near = (excess.abs() < 1e-6)[:, None]
        roots = torch.where(near, torch.stack([summit - step, summit + step], dim=1), roots)
        roots = _polished(loss, tau, roots)
        # τ <= 0 has one root: the other went to infinity
        roots[:, 1].masked_fill_(tau <= 0, torch.nan)
    roots[excess >= 0] = torch.nan
    roots[(excess >= 0) & (excess <= tolerance * top), 0] = summit
    return roots


def _summit(loss: MarginLoss) -> tuple[float, float]:
    if loss.name not in _SUMMITS:
        raise ValueError(
            f"expected a loss whose margins have a closed form, one of {', '.join(_SUMMITS)}, got "
            f"{loss.name!r}"
        )
    return _SUMMITS[loss.name]


def _lambert_roots(name: str, tau: Tensor) -> Tensor:
    """Both branches, (n, 2), of any value where a root does not exist."""
    t = tau.detach().cpu().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        shift, z = (t, -t * np.exp(t)) if name == "logistic" else (0.0, -t)
        roots = np.stack([shift - lambertw(z, branch).real for branch in (0, -1)], axis=1)
    return torch.from_numpy(roots).to(tau.device)


def _polished(loss: MarginLoss, tau: Tensor, roots: Tensor) -> Tensor:
    """Newton steps on −μ l'(μ) − τ, each taken only where it makes that smaller."""

    def misfit(mu: Tensor) -> Tensor:
        return -mu * loss.slope(mu) - tau[:, None]

    for _ in range(4):
        derivative = -loss.slope(roots) - roots * loss.curvature(roots)
        trial = roots - misfit(roots) / derivative
        better = misfit(trial).abs() < misfit(roots).abs()
        roots = torch.where(better, trial, roots)
    return roots
