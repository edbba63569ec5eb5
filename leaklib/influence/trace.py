"""Stochastic traces: tr K and tr f(K) from a few products, for inputs too large for a spectrum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from leaklib.influence.lanczos import Krylov, lanczos, tridiagonal
from leaklib.influence.products import Apply, check_sizes, dot, normalised, product


@dataclass(frozen=True)
class Estimate:
    """A stochastic estimate.

    Attributes:
        mean: (victims,).
        standard_error: (victims,), of the mean over the random vectors; 0 when exact.
        quadrature_error: (victims,), change of the mean when a quarter of the Lanczos steps is left
            out; 0 where there is no quadrature or it is exact. Not a bound.
        products: products with K for each victim.
    """

    mean: Tensor
    standard_error: Tensor
    quadrature_error: Tensor
    products: Tensor


def trace_estimate(
    apply: Apply,
    *,
    victims: int,
    d: int,
    generator: torch.Generator,
    samples: int = 32,
    method: Literal["hutchinson", "xtrace"] = "hutchinson",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Unbiased estimate of tr K from random vectors ω with E[ωωᵀ] = I.

    Hutchinson: mean of ωᵀKω over random signs, with variance 2 Σ_{i≠j} K_ij² per sample. XTrace:
    the trace on the range of KΩ exactly, the rest by Hutchinson with the one vector left out of Ω,
    averaged over the choices; far closer where a few eigenvalues hold most of the trace.

    Cost: `samples` products (Hutchinson), 2 · `samples` (XTrace); min(that, d) at most: with d
    products the diagonal is read off exactly. Memory: (victims, samples, d).
    Source: Hutchinson 1990; Epperly, Tropp & Webber 2024 (XTrace).

    Args:
        apply: u (victims, samples, d) -> K u, symmetric.
        victims: number of operators in the batch.
        d: size of the space.
        generator: draws the vectors.
        samples: random vectors for each victim, >= 2.
        method: "hutchinson" or "xtrace".
        dtype: precision the operator works in.
        device: of the vectors.

    Returns:
        Estimate, float64.

    Raises:
        ValueError: arguments out of range, products not finite.

    >>> K = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    >>> found = trace_estimate(lambda u: u @ K, victims=1, d=3, samples=2, dtype=torch.float64,
    ...     generator=torch.Generator().manual_seed(0))
    >>> found.mean.item(), found.standard_error.item()  # signs see a diagonal exactly
    (8.0, 0.0)
    """
    if method not in ("hutchinson", "xtrace"):
        raise ValueError(f"expected method 'hutchinson' or 'xtrace', got {method!r}")
    # On the sphere: two sign vectors may coincide, which XTrace would take for a loss of rank.
    sphere = method == "xtrace"
    probes, exact = _probes(victims, d, samples, generator, device, sphere=sphere)
    images = product(apply, probes, dtype=dtype)
    count = probes.shape[1]
    spent = torch.full((victims,), count, device=probes.device)
    if exact or method == "hutchinson":
        return _estimate(dot(probes, images), exact=exact, products=spent)
    Q, R = torch.linalg.qr(images.mT)  # (victims, d, samples), (victims, samples, samples)
    compressed = Q.mT @ product(apply, Q.mT.contiguous(), dtype=dtype).mT  # QᵀKQ
    compressed = 0.5 * (compressed + compressed.mT)
    inside = torch.diagonal(compressed, dim1=1, dim2=2).sum(1)
    pivots = torch.diagonal(R, dim1=1, dim2=2).abs()
    # When KΩ loses rank, Q holds the whole range of K: nothing is left outside.
    complete = pivots.amin(1) <= 16 * torch.finfo(dtype).eps * pivots.amax(1)
    safe = torch.where(complete[:, None, None], torch.eye(count).to(R), R)
    # Column i of S spans what Q loses when ω_i is left out.
    S = torch.linalg.inv(safe).mT
    S = S / torch.linalg.vector_norm(S, dim=1, keepdim=True)
    W = Q.mT @ probes.mT
    U = W - S * (S * W).sum(1, keepdim=True)  # projection of ω_i on the basis without it
    quadratic = dot(probes, images) - 2 * (U * R).sum(1) + (U * (compressed @ U)).sum(1)
    values = inside[:, None] - (S * (compressed @ S)).sum(1) + quadratic
    values = torch.where(complete[:, None], inside[:, None], values)
    return _estimate(values, exact=False, products=2 * spent)


def trace_of_function(
    apply: Apply,
    function: Callable[[Tensor], Tensor],
    *,
    victims: int,
    d: int,
    generator: torch.Generator,
    samples: int = 16,
    steps: int = 40,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Estimate of tr f(K) by stochastic Lanczos quadrature.

    ωᵀ f(K) ω ≈ ‖ω‖² Σ_k τ_k f(θ_k): Gauss quadrature with the eigenvalues θ of the tridiagonal T
    as nodes and the squared first entries of its eigenvectors as weights. m steps are exact for
    polynomials f of degree 2m − 1, and for any f once the Krylov space is exhausted.

    Cost: `samples` · `steps` products. Memory: (victims, samples, steps, d) in float64.
    Source: Golub & Meurant 2010; Ubaru, Chen & Saad 2017.

    Args:
        apply: u (victims, samples, d) -> K u, symmetric and positive semi-definite.
        function: elementwise, from eigenvalues >= 0 (float64, any shape) to values, for example
            lambda t: t / (t + damping) ** 2. Infinity at 0 makes the estimate infinite where K is
            singular up to rounding.
        victims: number of operators in the batch.
        d: size of the space.
        generator: draws the signs.
        samples: random vectors for each victim, >= 2; from d on, the unit vectors serve instead
            and no sampling error is left.
        steps: Lanczos steps for each vector; more for small dampings, see `quadrature_error`.
        dtype: precision the operator works in.
        device: of the vectors.

    Returns:
        Estimate, float64.

    Raises:
        ValueError: arguments out of range, K not symmetric, products not finite.

    >>> K = 2 * torch.eye(3, dtype=torch.float64)
    >>> found = trace_of_function(lambda u: u @ K, lambda t: t / (t + 1) ** 2, victims=1, d=3,
    ...     dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> round(found.mean.item(), 9)  # 3 · 2/9
    0.666666667
    """
    check_sizes(steps=steps)
    probes, exact = _probes(victims, d, samples, generator, device, sphere=False)
    space = lanczos(apply, probes, max_steps=steps, dtype=dtype, device=device)
    length, taken = dot(probes, probes), space.diagonal.shape[-1]
    full = length * _quadrature(function, space, taken)
    part = length * _quadrature(function, space, -(-3 * taken // 4))
    # A row that ended before has the same quadrature at every length from there on.
    change = torch.where(space.invariant, 0.0, full - part)
    found = _estimate(full, exact=exact, products=space.products.sum(1))
    pooled = change.sum(1) if exact else change.mean(1)
    return replace(found, quadrature_error=pooled.abs())


def _quadrature(function: Callable[[Tensor], Tensor], space: Krylov, steps: int) -> Tensor:
    """e₁ᵀ f(T) e₁ with the first steps of T, (victims, vectors)."""
    T = tridiagonal(space.diagonal[..., :steps], space.off_diagonal[..., : steps - 1])
    nodes, vectors = torch.linalg.eigh(T)
    weights = vectors[..., 0, :] ** 2
    values = function(nodes.clamp(min=0))
    if values.shape != nodes.shape:
        raise ValueError(
            f"expected an elementwise function, got {tuple(values.shape)} from {tuple(nodes.shape)}"
        )
    # Padding has weight zero; an infinite value there would make it NaN.
    return torch.where(weights > 0, weights * values, 0.0).sum(-1)


def _probes(
    victims: int,
    d: int,
    samples: int,
    generator: torch.Generator,
    device: torch.device | str,
    *,
    sphere: bool,
) -> tuple[Tensor, bool]:
    """Random vectors (victims, samples, d) with E[ωωᵀ] = I, or the unit vectors if no dearer."""
    check_sizes(victims=victims, d=d)
    if samples < 2:
        raise ValueError(f"expected samples >= 2, got {samples}; one says nothing of the error")
    if samples * (2 if sphere else 1) >= d:
        eye = torch.eye(d, dtype=torch.float64, device=device)
        return eye.repeat(victims, 1, 1), True
    # Victim by victim: the first one's vectors do not depend on how many follow.
    drawn = torch.stack(
        [
            torch.randn(samples, d, generator=generator, device=generator.device)
            for _ in range(victims)
        ]
    ).to(device, torch.float64)
    if sphere:
        return normalised(drawn)[0] * d**0.5, False
    return torch.where(drawn < 0, -1.0, 1.0).double(), False


def _estimate(values: Tensor, *, exact: bool, products: Tensor) -> Estimate:
    """From one value per vector: their sum over the unit vectors, or mean and standard error."""
    zero = torch.zeros_like(values[:, 0])
    if exact:
        return Estimate(values.sum(1), zero, zero, products)
    error = values.std(1) / values.shape[1] ** 0.5
    return Estimate(values.mean(1), error, zero, products)
