"""The rank of one layer's equations by singular values, whatever the scales of weight and gradient.

Rows of K are 100 to 1000 times shorter than rows of W, so no one tolerance serves the stack of
both. With K = I ⊗ K̃ and N an orthonormal basis of the null space of K̃,

    rank [W; K] = C rank K̃ + rank W(I ⊗ N)      in each group of C channels,

and each of the two has its own scale. Unlike counting this holds for the weights and gradients at
hand: dead units, pruned gradients and zero filters included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.layer_system.block import gradient_block
from leaklib.layer_system.geometry import Geometry
from leaklib.layer_system.operators import LinearMap
from leaklib.layer_system.published import weight_matrix
from leaklib.layer_system.split import null_rows

# Measured relative singular values of generic layers end above 1e-3 and go on below 1e-13.
TOLERANCE = 1e-10

# Rows times columns of the largest matrix: a gigabyte, and some minutes on one core.
LARGEST = 120_000_000


@dataclass(frozen=True)
class SingularRank:
    """Ranks of one layer's equations for given weights and gradients; every entry (victims,).

    Args:
        unknowns: n, entries of the input; one number for all victims.
        gradient_rank: rank of K.
        rank: rank of [W; K].
        smallest_kept: smallest singular value that counted, over the scale of its matrix.
        largest_dropped: largest one that did not, 0 where all counted. Where the two are close,
            the rank depends on the tolerance.
    """

    unknowns: int
    gradient_rank: Tensor
    rank: Tensor
    smallest_kept: Tensor
    largest_dropped: Tensor

    @property
    def deficit(self) -> Tensor:
        """RA = rank − n <= 0, (victims,)."""
        return self.rank - self.unknowns

    @property
    def condition(self) -> Tensor:
        """σ_max/σ_min of the worse of the two steps, K̃ and W(I ⊗ N), null directions excluded.

        It bounds how a solver that takes the gradient rows first enlarges relative errors.
        """
        return 1 / self.smallest_kept


def singular_rank(
    geometry: Geometry,
    weight: Tensor,
    preactivation_grad: Tensor,
    *,
    known: Tensor | None = None,
    pool: LinearMap | None = None,
    tolerance: float = TOLERANCE,
) -> SingularRank:
    """Rank of [W; K] by singular values, in float64.

    Args:
        geometry: sizes of the convolution.
        weight: w (filters, channels per group, kernel height, kernel width).
        preactivation_grad: k = ∂L/∂z (victims, filters, height, width), or without victims.
        known: which entries of z are known (victims, filters, height, width); None: all. A ReLU's
            zeros are not, and k is 0 there.
        pool: a linear map behind the layer: then z is known as P z only.
        tolerance: what counts, relative to the largest singular value of K̃, and of W(I ⊗ N).

    Returns:
        SingularRank. Cost: for each victim and group, two singular value decompositions: of a
        matrix of filters·taps x pixels, and of one of filters·outputs x channels·(pixels − rank K̃).

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a tolerance outside (0, 1),
            or matrices too large.

    Source: our derivation; R-GAP and COPA decompose the stack as it is.

    One filter of one tap that sees every pixel gives all of them, and its gradient one sum:

    >>> found = singular_rank(
    ...     Geometry((1, 2, 2), 1, (1, 1)), torch.ones(1, 1, 1, 1), 1e-9 * torch.ones(1, 2, 2)
    ... )
    >>> found.gradient_rank.item(), found.rank.item()
    (1, 4)
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a number between 0 and 1, got {tolerance}")
    weight = check_weight(geometry, weight)
    k = _check_grad(geometry, preactivation_grad)
    seen = None if known is None else known.to(k).expand(len(k), *geometry.output_shape)
    channels, taps = geometry.weight_shape[1], geometry.kernel[0] * geometry.kernel[1]
    pixels = geometry.input_shape[1] * geometry.input_shape[2]
    filters = geometry.filters // geometry.groups
    check_size(max(filters * taps, pixels), pixels)
    weights = weight.reshape(geometry.groups, filters, channels, taps)
    gradient_rank, rank, kept, dropped = [], [], [], []
    for victim in range(len(k)):
        block = gradient_block(geometry, k[[victim]])[0]
        mask = None if seen is None else seen[victim].reshape(geometry.groups, -1, 1)
        by_gradient, by_both, ends = 0, 0, _Ends()
        for group in range(geometry.groups):
            # a wide or a tall block alike: R of the QR decomposition has the same right vectors
            _, values, right = torch.linalg.svd(torch.linalg.qr(block[group], mode="r").R)
            of_block = ends.count(values, values[0], tolerance)
            check_size(filters * geometry.positions, channels * (pixels - of_block))
            mixed = null_rows(geometry, weights[group], right[of_block:].T)
            if mask is not None:
                mixed = mixed * mask[group]
            if pool is not None:
                images = mixed.T.reshape(-1, filters, *geometry.output_size)
                mixed = pool.forward(images).flatten(1).T
            # where W sees nothing of the null space, what is left is rounding of this size
            floor = 1e-3 * weights[group].norm()
            values = torch.linalg.svdvals(mixed)
            top = values[0].maximum(floor) if len(values) else floor
            by_gradient += channels * of_block
            by_both += channels * of_block + ends.count(values, top, tolerance)
        gradient_rank.append(by_gradient)
        rank.append(by_both)
        kept.append(ends.kept)
        dropped.append(ends.dropped)
    return SingularRank(
        geometry.unknowns, torch.tensor(gradient_rank), torch.tensor(rank),
        torch.tensor(kept, dtype=torch.float64), torch.tensor(dropped, dtype=torch.float64),
    )  # fmt: skip


def singular_weight_rank(
    geometry: Geometry, weight: Tensor, *, tolerance: float = TOLERANCE
) -> int:
    """Rank of W alone by singular values, in float64; |z| less it is the virtual constraints.

    Args:
        geometry: sizes of the convolution.
        weight: (filters, channels per group, kernel height, kernel width).
        tolerance: what counts, relative to the largest singular value.

    Returns:
        rank. Cost: a singular value decomposition of |z| x n numbers, some 20 s for CNN6's first
        layer.

    Raises:
        ValueError: as `singular_rank`.
    """
    weight = check_weight(geometry, weight)
    check_size(geometry.filters * geometry.positions, geometry.unknowns)
    values = torch.linalg.svdvals(weight_matrix(geometry, weight))
    return int((values > tolerance * values[0]).sum()) if values[0] > 0 else 0


@dataclass
class _Ends:
    """The smallest relative singular value that counted and the largest that did not."""

    kept: float = 1.0
    dropped: float = 0.0

    def count(self, values: Tensor, scale: Tensor, tolerance: float) -> int:
        if not len(values) or float(scale) == 0:
            return 0
        relative = values / scale
        number = int((relative > tolerance).sum())
        if number:
            self.kept = min(self.kept, float(relative[number - 1]))
        if number < len(values):
            self.dropped = max(self.dropped, float(relative[number]))
        return number


def check_size(rows: int, columns: int) -> None:
    """Refuse a matrix that would take minutes and gigabytes.

    Raises:
        ValueError: more than `LARGEST` entries.
    """
    if rows * columns > LARGEST:
        raise ValueError(
            f"expected a matrix of at most {LARGEST:,} entries for singular values, got {rows} x "
            f"{columns}; count instead (generic_rank), or use smaller images"
        )


def check_weight(geometry: Geometry, weight: Tensor) -> Tensor:
    """The weight in float64.

    Raises:
        ValueError: a shape that does not fit, or values that are not finite.
    """
    if tuple(weight.shape) != geometry.weight_shape:
        raise ValueError(
            f"weight: expected shape {geometry.weight_shape}, got {tuple(weight.shape)}; it is "
            "(filters, channels per group, kernel height, kernel width)"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite values, got inf or NaN; check the training")
    return weight.detach().double()


def _check_grad(geometry: Geometry, grad: Tensor) -> Tensor:
    shape = geometry.output_shape
    if grad.ndim not in (3, 4) or tuple(grad.shape[-3:]) != shape or not grad.numel():
        raise ValueError(
            f"preactivation_grad: expected shape (victims, {', '.join(map(str, shape))}), got "
            f"{tuple(grad.shape)}"
        )
    if not bool(grad.isfinite().all()):
        raise ValueError(
            "preactivation_grad: expected finite values, got inf or NaN; check the loss"
        )
    return grad.detach().double().reshape(-1, *shape)
