"""Lanczos in input space: the extreme eigenvalues of a symmetric operator, with error bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.influence.products import Apply, check_sizes, dot, normalised, packed_product

# An asymmetry above this share of the norm is no rounding.
ASYMMETRIC = 1e-2


@dataclass(frozen=True)
class Krylov:
    """Orthonormal bases Q of Krylov spaces and T = QᵀKQ, tridiagonal.

    A row that stopped early is padded: T with copies of its first diagonal entry, uncoupled, which
    change neither its extreme eigenvalues nor its Gauss quadrature; Q with zeros.

    Attributes:
        diagonal: (victims, vectors, steps).
        off_diagonal: (victims, vectors, steps − 1).
        last: (victims, vectors), the coupling β_m of the space to the rest.
        invariant: (victims, vectors), β_m is zero up to rounding.
        basis: (victims, vectors, steps, d), float64.
        products: (victims, vectors), the steps of each row.
        asymmetry: (victims, vectors), largest entry by which Qᵀ K Q failed to be tridiagonal: the
            rounding of the products, seen at work.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    last: Tensor
    invariant: Tensor
    basis: Tensor
    products: Tensor
    asymmetry: Tensor

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of T (..., steps), ascending, and its eigenvectors (..., steps, steps)."""
        values, vectors = torch.linalg.eigh(tridiagonal(self.diagonal, self.off_diagonal))
        # A row of one step cannot be told from its padding by value: all its vectors are e₁.
        first = torch.zeros_like(vectors)
        first[..., 0, :] = 1
        return values, torch.where((self.products == 1)[..., None, None], first, vectors)

    def ritz_errors(self, vectors: Tensor) -> Tensor:
        """|β_m s_m|: some eigenvalue of K lies within this of each Ritz value, (..., steps)."""
        row = (self.products - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, vectors.shape[-1])
        return self.last[..., None] * vectors.gather(2, row).squeeze(2).abs()


@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum. Errors are rigorous up to rounding: an eigenvalue lies within them.

    Attributes:
        largest: (victims,), never above λ_max.
        largest_vector: (victims, d), unit.
        largest_error: (victims,), residual ‖K y − θ y‖ of the Ritz pair, at least the rounding.
            The value itself is far closer than that: about largest_error²/gap.
        smallest: (victims,), never below λ_min. Converges slowly: the small eigenvalues of a Gram
            matrix lie densely, the largest ones apart.
        smallest_error: (victims,), as above; compare it with `smallest`.
        converged: (victims,), largest_error <= tolerance · largest.
        smallest_converged: (victims,), smallest_error <= tolerance · smallest, or the space was
            exhausted and `smallest` is exact up to rounding.
        products: (victims,), products with K.
    """

    largest: Tensor
    largest_vector: Tensor
    largest_error: Tensor
    smallest: Tensor
    smallest_error: Tensor
    converged: Tensor
    smallest_converged: Tensor
    products: Tensor


def extreme_eigenvalues(
    apply: Apply,
    *,
    victims: int,
    d: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tolerance: float = 1e-4,
    max_products: int = 100,
    smallest: bool = False,
) -> Extremes:
    """λ_max of every victim's K, and what the same space says of λ_min.

    T = QᵀKQ over the Krylov space of a random vector; eigenpairs (θ, s) of T give Ritz pairs
    (θ, Qs) of K with residual ‖KQs − θQs‖ = |β_m s_m|. After d steps, or in an invariant space
    (fewer distinct eigenvalues than steps), both ends are exact.

    Cost: one product a step, 10 to 15 for λ_max at 1e-4 where it stands apart, up to d for λ_min.
    Memory: (victims, steps, d) in float64, nothing of parameter size.
    Source: Lanczos 1950; bounds by Paige 1972, in Parlett, The Symmetric Eigenvalue Problem, §13.

    Args:
        apply: u (victims, 1, d) -> K u, symmetric.
        victims: number of operators in the batch.
        d: size of the space.
        generator: draws the starting vectors.
        dtype: precision the operator works in.
        device: of the vectors.
        tolerance: on the residual, relative to the eigenvalue.
        max_products: steps for each victim.
        smallest: go on until λ_min has converged too, or `max_products`.

    Returns:
        Extremes.

    Raises:
        ValueError: arguments out of range; K not symmetric; products not finite.

    >>> K = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    >>> found = extreme_eigenvalues(lambda u: u @ K, victims=1, d=3, dtype=torch.float64,
    ...     generator=torch.Generator().manual_seed(0))
    >>> round(found.largest.item(), 9), round(found.smallest.item(), 9), found.products.item()
    (5.0, 1.0, 3)
    """
    check_sizes(victims=victims, d=d, max_products=max_products)
    if not tolerance > 0:
        raise ValueError(f"expected tolerance > 0, got {tolerance}; try 1e-4")
    # Victim by victim: the first one's start does not depend on how many follow.
    start = torch.stack(
        [torch.randn(1, d, generator=generator, device=generator.device) for _ in range(victims)]
    )
    rounding = torch.finfo(dtype).eps

    def ends(space: Krylov) -> tuple[Tensor, ...]:
        """Value, error, convergence of both ends, and the vector of the upper one in Q."""
        values, vectors = space.ritz()
        # What rounding in the products hides, no bound may claim.
        floor = torch.maximum(
            rounding * values.abs().amax(-1, keepdim=True), space.asymmetry[..., None]
        )
        errors = torch.maximum(space.ritz_errors(vectors), floor)
        reached = (errors <= tolerance * values.abs()) | space.invariant[..., None]
        both = tuple(t[..., i] for t in (values, errors, reached) for i in (-1, 0))
        return *both, vectors[..., -1]

    def finished(space: Krylov) -> Tensor:
        high, low = ends(space)[4:6]
        return high & low if smallest else high

    space = lanczos(apply, start, max_steps=max_products, dtype=dtype, device=device,
                    finished=finished)  # fmt: skip
    high, low, high_error, low_error, high_reached, low_reached, top = (
        t.squeeze(1) for t in ends(space)
    )
    vector = normalised((top[..., None] * space.basis.squeeze(1)).sum(1))[0]
    return Extremes(
        largest=high,
        largest_vector=vector.to(dtype),
        largest_error=high_error,
        smallest=low,
        smallest_error=low_error,
        converged=high_reached,
        smallest_converged=low_reached,
        products=space.products.squeeze(1),
    )


def lanczos(
    apply: Apply,
    start: Tensor,
    *,
    max_steps: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    finished: Callable[[Krylov], Tensor] | None = None,
) -> Krylov:
    """Krylov spaces of K from each start, with full reorthogonalisation.

    K q_m = β_{m−1} q_{m−1} + α_m q_m + β_m q_{m+1}. Each new vector is orthogonalised twice against
    all earlier ones; without that, copies of converged eigenvalues appear.

    Cost: one product per step and row; 4 m d flops at step m. Memory: (victims, vectors, steps, d).
    Source: Lanczos 1950; twice is enough: Parlett, §6.9.

    Args:
        apply: u (victims, vectors, d) -> K u, symmetric.
        start: (victims, vectors, d), nonzero.
        max_steps: at most this, at most d.
        dtype: precision the operator works in.
        device: of the vectors.
        finished: space so far -> (victims, vectors), rows that need no more steps.

    Returns:
        Krylov; rows that finished keep the space they finished with.

    Raises:
        ValueError: zero start, K not symmetric, products not finite.
    """
    q, size = normalised(start.to(device, torch.float64))
    if not (size > 0).all():
        raise ValueError("expected nonzero starting vectors, got a zero vector; draw another")
    rounding = torch.finfo(dtype).eps
    d = q.shape[-1]
    running = torch.ones_like(size, dtype=torch.bool)
    last, scale = torch.zeros_like(size), torch.zeros_like(size)
    asymmetry = torch.zeros_like(size)
    invariant, products = torch.zeros_like(running), torch.zeros_like(size, dtype=torch.int64)
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    space: Krylov
    while True:
        basis.append(q)
        w, _ = packed_product(apply, q, running, dtype=dtype)
        products = products + running
        alpha = torch.where(running, dot(q, w), diagonal[0] if diagonal else 0.0)
        diagonal.append(alpha)
        scale = torch.maximum(scale, torch.linalg.vector_norm(w, dim=-1))
        Q = torch.stack(basis, dim=2)  # (victims, vectors, steps, d)
        coefficients = (Q @ w[..., None]).squeeze(-1)
        coupling = off_diagonal[-1:] or [torch.zeros_like(alpha)]
        gap = _asymmetry(coefficients, coupling[0], scale)
        asymmetry = torch.maximum(asymmetry, torch.where(running, gap, 0.0))
        w = w - (coefficients[..., None, :] @ Q).squeeze(-2)
        w = w - ((Q @ w[..., None]).mT @ Q).squeeze(-2)
        q, beta = normalised(w)
        # Products round by about √d ε‖K‖ in norm; what is left below that points nowhere.
        exhausted = (beta <= 4 * d**0.5 * rounding * scale) | (len(basis) == d)
        last = torch.where(running, beta, last)
        invariant |= running & exhausted
        space = Krylov(
            diagonal=torch.stack(diagonal, dim=-1),
            off_diagonal=torch.stack(off_diagonal, dim=-1)
            if off_diagonal
            else beta.new_zeros(*beta.shape, 0),
            last=last,
            invariant=invariant,
            basis=Q,
            products=products,
            # below the rounding that is known anyway it says nothing
            asymmetry=asymmetry.where(asymmetry > rounding**0.5 * scale, 0.0),
        )
        running = running & ~exhausted
        if finished is not None:
            running = running & ~finished(space)
        if len(basis) >= max_steps or not running.any():
            return space
        off_diagonal.append(torch.where(running, beta, 0.0))
        q = q * running[..., None]


def tridiagonal(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """Symmetric tridiagonal matrices (..., m, m) from (..., m) and (..., m − 1)."""
    upper = torch.diag_embed(off_diagonal, offset=1)
    return torch.diag_embed(diagonal) + upper + upper.mT


def _asymmetry(coefficients: Tensor, coupling: Tensor, scale: Tensor) -> Tensor:
    """How far Qᵀ K q_m is from zero but for its last two entries, β_{m−1} and α_m.

    Float32 products at a picture that the network is certain of lose three digits in softmax −
    onehot, so only a gap that no rounding explains is refused.
    """
    if coefficients.shape[-1] < 2:
        return torch.zeros_like(scale)
    expected = torch.zeros_like(coefficients[..., :-1])
    expected[..., -1] = coupling
    gap = (coefficients[..., :-1] - expected).abs().amax(-1)
    if (gap > ASYMMETRIC * scale).any():
        worst = float((gap / scale).nan_to_num().max())
        raise ValueError(
            f"expected a symmetric operator, got an asymmetry of {worst:.1e} of its norm; "
            "check that jtu is the transpose of jv, and that the model is deterministic"
        )
    return gap
