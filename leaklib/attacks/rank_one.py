"""Recovery from a perturbed first layer: the gradient of one image has rank one, noise has not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leaklib.attacks.analytic import as_reconstruction, first_layer_gradient
from leaklib.attacks.reconstruction import Reconstruction
from leaklib.gradients.payload import SharedGradient

# Entries of the gradients that are worked on at once: 256 MiB in float64.
_AT_ONCE = 2**25


def rank_one(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, int, int],
    layer: str | None = None,
    labels: Tensor | None = None,
    complete: bool = False,
    sweeps: int = 10,
) -> Reconstruction:
    """The image from a noisy or pruned gradient of a fully connected first layer.

    [∂L/∂W | ∂L/∂b] = k [x | 1] for one image. With noise on every entry the best matrix of rank one
    is that of the largest singular value, and x = v_{1..n} / v_{n+1} for its right singular vector
    v: all entries vote, where one row of the layer would carry all of its own noise; up to which
    noise, `leaklib.attacks.noise_limit` says. With most entries pruned, `complete` fits k [x | 1]
    to those that survived (see `complete_rank_one`): that pays where a little noise comes with the
    pruning. Pruned alone, the row of the largest k_j has kept every pixel that any row has kept,
    and `analytic(rows="largest")` gives the same picture at once.

    Cost: the eigenvalues of one outputs x outputs matrix per victim; each sweep of a completion
    two passes over the layer's gradient.
    Source: ours; an adaptive attack on PRECODE with partial perturbation (arXiv 2208.04767).

    Args:
        model: the shared model; its input normalisation is undone.
        shared: the released gradients, batch 1.
        image_shape: (channels, height, width).
        layer: name of the first layer; None takes the first one as wide as the image.
        labels: (victims, 1) if known; None recovers them from the last layer.
        complete: entries that are exactly zero are taken for pruned, not for zeros.
        sweeps: of the completion.

    Returns:
        Reconstruction with objective 0 and no evaluations. Pixels are not boxed.

    Raises:
        ValueError: as `analytic`; or a victim whose scale is lost with its whole bias gradient.
    """
    if sweeps < 1:
        raise ValueError(f"expected sweeps >= 1, got {sweeps}")
    weight, bias = first_layer_gradient(model, shared, image_shape, layer)
    parts = []
    for rows in torch.arange(len(weight)).split(max(1, _AT_ONCE // weight[0].numel())):
        matrix = torch.cat([weight[rows], bias[rows, :, None]], dim=2).double()
        if complete:
            parts.append(complete_rank_one(matrix, matrix != 0, sweeps=sweeps)[1])
        else:
            parts.append(leading_pair(matrix)[1])
    right = torch.cat(parts)
    flat = right[:, :-1] / right[:, -1:]
    if not torch.isfinite(flat).all():
        victim = int((~torch.isfinite(flat).all(1)).nonzero()[0])
        raise ValueError(
            f"expected a bias gradient that is not zero, got zero for victim {victim}, which "
            "leaves the brightness of its image open; use ignore_stochastic"
        )
    return as_reconstruction(model, shared, flat, image_shape, labels)


def leading_pair(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The best matrix of rank one, M ≈ l rᵀ, by the largest singular value.

    From the eigenvectors of MMᵀ: a few times faster than all singular vectors, and the largest one
    loses nothing by squaring.

    Args:
        matrix: M, (..., rows, columns), few rows and many columns.

    Returns:
        l with unit length (..., rows), and r = Mᵀ l (..., columns).

    >>> matrix = torch.tensor([[3.0, 6.0], [4.0, 8.0]])
    >>> torch.allclose(torch.outer(*leading_pair(matrix)), matrix)
    True
    """
    left = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[..., -1]
    return left, torch.einsum("...oi,...o->...i", matrix, left)


def complete_rank_one(matrix: Tensor, known: Tensor, *, sweeps: int) -> tuple[Tensor, Tensor]:
    """M ≈ l rᵀ on the known entries alone: min Σ_known (M_oi − l_o r_i)², alternating.

    l_o = Σ_i M_oi r_i / Σ_i r_i² and r_i = Σ_o M_oi l_o / Σ_o l_o², sums over the known entries of
    that row or column. A column without any is given 0: pruning by size removes small products.
    Under noise, a column that is known in rows of tiny l_o alone can come out far too large.

    Args:
        matrix: M, (..., rows, columns), zero where unknown.
        known: the mask, of the same shape.
        sweeps: alternations, >= 1, from the best rank one of M itself.

    Returns:
        l (..., rows) and r (..., columns).

    Source: ours; the plain alternation for completing a matrix.
    """
    mask = known.to(matrix.dtype)
    matrix = matrix * mask
    left, right = leading_pair(matrix)
    for _ in range(sweeps):
        right = _divided(
            torch.einsum("...oi,...o->...i", matrix, left),
            torch.einsum("...oi,...o->...i", mask, left.square()),
        )
        left = _divided(
            torch.einsum("...oi,...i->...o", matrix, right),
            torch.einsum("...oi,...i->...o", mask, right.square()),
        )
        left = left / torch.linalg.vector_norm(left, dim=-1, keepdim=True)
    return left, _divided(
        torch.einsum("...oi,...o->...i", matrix, left),
        torch.einsum("...oi,...o->...i", mask, left.square()),
    )


def _divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
