"""Products with a symmetric operator that is known only by its action on vectors.

The solvers of this room keep vectors of input size and scalars in float64, whatever the precision
in which the operator works; only what goes through the operator is rounded to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
"""u (victims, vectors, d) -> K u, of the same shape and dtype."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ over the last axis, accumulated in float64."""
    return (a.double() * b.double()).sum(-1)


def product(apply: Apply, vectors: Tensor, *, dtype: torch.dtype) -> Tensor:
    """K u, computed in `dtype` and returned in float64.

    Args:
        apply: the operator.
        vectors: (victims, vectors, d).
        dtype: the precision the operator works in.

    Returns:
        (victims, vectors, d), float64, detached.

    Raises:
        ValueError: the operator answers with another shape, or with NaN or infinity.
    """
    found = apply(vectors.to(dtype)).detach()
    if found.shape != vectors.shape:
        raise ValueError(
            f"expected a product of shape {tuple(vectors.shape)}, got {tuple(found.shape)}; apply "
            "takes and returns (victims, vectors, d)"
        )
    finite = found.isfinite().all(-1).all(-1)
    if not finite.all():
        raise ValueError(
            "expected finite products, got NaN or infinity for victims "
            f"{(~finite).nonzero().flatten().tolist()}; check the inputs and the model there, or "
            f"work in float64 instead of {dtype}"
        )
    return found.double()


def packed_product(
    apply: Apply, vectors: Tensor, wanted: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, int]:
    """K u for the wanted vectors only, zero for the others.

    The operator takes the same number of vectors for every victim. Each victim's wanted ones move
    to the front, so that the pass is as wide as the busiest victim and no wider.

    Args:
        apply: the operator.
        vectors: (victims, vectors, d), float64.
        wanted: (victims, vectors), bool.
        dtype: the precision the operator works in.

    Returns:
        (victims, vectors, d) and the number of vectors that went through the operator, idle places
        of the less busy victims included.

    Raises:
        ValueError: see `product`.
    """
    width = int(wanted.sum(1).max())
    if width == 0:
        return torch.zeros_like(vectors), 0
    if width == vectors.shape[1]:
        found = product(apply, vectors, dtype=dtype)
        return found * wanted[..., None], wanted.numel()
    front = wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    index = front[..., None].expand(-1, -1, vectors.shape[2])
    kept = wanted.gather(1, front)[..., None]
    found = product(apply, vectors.gather(1, index) * kept, dtype=dtype)
    return torch.zeros_like(vectors).scatter(1, index, found * kept), front.numel()


def normalised(b: Tensor) -> tuple[Tensor, Tensor]:
    """b/‖b‖ and ‖b‖; zero stays zero."""
    largest = b.abs().amax(-1, keepdim=True)
    scaled = b / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, 1.0), (norm * largest).squeeze(-1)


def check_sizes(**sizes: int) -> None:
    """Refuse a size or count below one, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} >= 1, got {size}")
