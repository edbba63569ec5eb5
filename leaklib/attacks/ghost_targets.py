"""What a linear layer's weight gradient has to do with a target, without forming the gradient.

A batch of B inputs a_b with output gradients δ_b has the weight gradient G = Σ_b δ_b a_bᵀ, of rank
B at most. So its norm is a sum over pairs, and a released gradient Ĝ that nobody perturbed is a
product of thin factors too. Every target is held as

    Ĝ = Q C + R,   QᵀQ = 1,  QᵀR = 0,  Q (out, r), C (r, in), r <= B,

where the remainder R, as large as the weights, is dropped if it is rounding.

Source: derived here; for the norm of one example it is that of Goodfellow 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# columns that the range finder draws beside the rank it looks for
_OVERSAMPLING = 4
# R counts as rounding below this many units of the target's norm
_ROUNDING = 32


@dataclass(frozen=True, eq=False)
class Target:
    """Released weight gradients of one layer, Ĝ = Q C + R.

    Attributes:
        left: Q, (victims, out, r).
        right: C, (victims, r, in).
        rest: R, (victims, out, in); None where it is rounding for every victim.
        square: ‖Ĝ‖², (victims,).
        rest_square: ‖R‖², (victims,); 0 where it is dropped.
    """

    left: Tensor
    right: Tensor
    rest: Tensor | None
    square: Tensor
    rest_square: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Which victim each row of a problem belongs to.

    Attributes:
        victims: (rows,).
        block: rows per victim where all victims stand in order, equally often; else None.
    """

    victims: Tensor
    block: int | None


def choose_rows(victims: Tensor, total: int) -> Rows:
    """Describe rows whose victims, out of `total`, are these."""
    block = len(victims) // total
    everyone = torch.arange(total, device=victims.device).repeat_interleave(block)
    return Rows(victims, block if block and torch.equal(everyone, victims) else None)


def choose(released: Tensor, rows: Rows) -> Tensor:
    """What each row's victim released, (rows, ...); no copy where rows are victims."""
    return released if rows.block == 1 else released[rows.victims]


def factor_target(released: Tensor, rank: int) -> Target:
    """Split released gradients into factors of this rank and what remains.

    The factors are those of a randomised range finder (Halko, Martinsson & Tropp 2011, Algorithm
    4.1) in float64. They need not be the best of their rank: R makes the split exact.

    Cost: a handful of products with Ĝ, one victim at a time.

    Args:
        released: Ĝ, (victims, out, in).
        rank: B, the rank of an unperturbed gradient.

    Returns:
        The target, in the dtype of `released`.

    >>> unperturbed = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0]))
    >>> target = factor_target(unperturbed[None], 1)
    >>> target.rest is None, round(float(target.square))
    (True, 574)
    """
    _, out, features = released.shape
    rank = min(rank, out, features)
    width = min(rank + _OVERSAMPLING, out, features)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(features, width, generator=generator, dtype=torch.float64)
    probe = probe.to(released.device)
    limit = _ROUNDING * torch.finfo(released.dtype).eps
    lefts, rights, squares, rest_squares = [], [], [], []
    rests: list[Tensor | None] = []
    for one in released:
        exact = one.double()
        basis = torch.linalg.qr(exact @ probe)[0]
        turn = torch.linalg.svd(basis.mT @ exact, full_matrices=False)[0]
        left = basis @ turn[:, :rank]
        right = left.mT @ exact
        rest = torch.addmm(exact, left, right, alpha=-1)
        square, rest_square = exact.square().sum(), rest.square().sum()
        small = bool(rest_square <= limit**2 * square)
        lefts.append(left)
        rights.append(right)
        squares.append(square)
        rest_squares.append(torch.zeros_like(rest_square) if small else rest_square)
        rests.append(None if small else rest.to(released.dtype))
    left, right, square, rest_square = (
        torch.stack(part).to(released.dtype) for part in (lefts, rights, squares, rest_squares)
    )
    if all(rest is None for rest in rests):
        return Target(left, right, None, square, rest_square)
    blank = torch.zeros_like(released[0])
    dense = torch.stack([blank if rest is None else rest for rest in rests])
    return Target(left, right, dense, square, rest_square)


def squared_norm(a: Tensor, delta: Tensor) -> Tensor:
    """‖G‖² = Σ_bc (δ_b·δ_c)(a_b·a_c) of every row.

    Args:
        a: (rows, batch, in).
        delta: (rows, batch, out).

    Returns:
        (rows,).
    """
    return ((delta @ delta.mT) * (a @ a.mT)).sum((1, 2))


def inner_product(target: Target, rows: Rows, a: Tensor, delta: Tensor) -> Tensor:
    """⟨G, Ĝ⟩ = Σ_b (δ_bᵀQ)(C a_b) + δ_bᵀ R a_b of every row.

    Args:
        target: of all victims.
        rows: which of them the rows belong to.
        a: (rows, batch, in).
        delta: (rows, batch, out).

    Returns:
        (rows,).
    """
    left, right = target.left[rows.victims], target.right[rows.victims]
    inner = ((delta @ left) * (a @ right.mT)).sum((1, 2))
    return inner if target.rest is None else inner + _with_rest(target.rest, rows, a, delta)


def squared_distance(target: Target, rows: Rows, a: Tensor, delta: Tensor) -> Tensor:
    """‖G − Ĝ‖² of every row, accurate where it is small beside ‖G‖².

    With Δ of rows δ_b, A of rows a_b and any constant M, G − QC = (Δᵀ − QM)A + Q(MA − C).
    For M = QᵀΔᵀ both terms vanish with the distance, and nothing large cancels as it does in
    ‖G‖² − 2⟨G, Ĝ⟩ + ‖Ĝ‖². The remainder R adds ‖R‖² − 2⟨(Δᵀ − QM)A, R⟩, since QᵀR = 0.

    Args:
        target: of all victims.
        rows: which of them the rows belong to.
        a: (rows, batch, in).
        delta: (rows, batch, out).

    Returns:
        (rows,).
    """
    left, right = target.left[rows.victims], target.right[rows.victims]
    mixing = (delta.detach() @ left).mT  # M (rows, r, batch), a constant of the identity
    across = delta.mT - left @ mixing  # (rows, out, batch)
    along = mixing @ a - right  # (rows, r, in)
    value = ((across.mT @ across) * (a @ a.mT)).sum((1, 2)) + along.square().sum((1, 2))
    value = value + 2 * ((left.mT @ across @ a) * along).sum((1, 2))
    if target.rest is None:
        return value
    beside = _with_rest(target.rest, rows, a, across.mT)
    return value - 2 * beside + target.rest_square[rows.victims]


def _with_rest(rest: Tensor, rows: Rows, a: Tensor, delta: Tensor) -> Tensor:
    """Σ_b δ_bᵀ R a_b of every row, without a copy of R, which is as large as the payload."""
    if rows.block is not None:
        shape = (len(rest), rows.block * a.shape[1])
        product = delta.reshape(*shape, -1) @ rest
        return (product.view_as(a) * a).sum((1, 2))
    order = torch.argsort(rows.victims)
    counts = torch.bincount(rows.victims, minlength=len(rest)).tolist()
    parts, begin = [], 0
    for victim, count in enumerate(counts):
        if count:
            chosen = order[begin : begin + count]
            parts.append(((delta[chosen] @ rest[victim]) * a[chosen]).sum((1, 2)))
            begin += count
    return torch.cat(parts)[torch.argsort(order)]
