"""The length of the last layer's input, from the label's row of a softmax gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import lambertw
from torch import Tensor

# (t, rows) -> value at β = eᵗ; t has one more axis than rows, or the same
Curve = Callable[[Tensor, Tensor], Tensor]

_BLOCK = 256  # rows searched together, for the memory of (rows, points, classes)


def softmax_norms(
    differences: Tensor, length: Tensor, *, points: int = 128
) -> tuple[Tensor, Tensor]:
    """All β > 0 with β (1 − p(β)) = g, where 1/p(β) = 1 + Σ_j exp(β d_j).

    With x = βu, |u| = 1 and d_j = (w_j − w_c)·u, p is the softmax of the label c. Its row of the
    gradient, (p − 1) xᵀ, has the length g. The left side lies below β, and above β/2 if some
    d_j >= 0; else it decays like β exp(−β min|d_j|): all roots lie in an interval known beforehand.
    A grid in log β finds its stationary points, and between two of these it is monotone. It has at
    most 2 (classes − 1) roots, most often one or two.
    Source: our derivation. Cost: about 500 softmaxes a row.

    Args:
        differences: d (rows, classes − 1), float64, without the label's own.
        length: g > 0 (rows,).
        points: of the grid.

    Returns:
        Row of each root and β, ascending by row, then β. Where there is no root, as under noise,
        the β that comes closest.

    >>> rows, norms = softmax_norms(torch.zeros(1, 3).double(), torch.tensor([0.75]).double())
    >>> rows, norms  # four equal logits: β · 3/4
    (tensor([0]), tensor([1.], dtype=torch.float64))
    """
    parts = [
        _norms(differences[block], length[block], points)
        for block in torch.arange(len(length), device=length.device).split(_BLOCK)
    ]
    rows = [part[0] + _BLOCK * number for number, part in enumerate(parts)]
    return torch.cat(rows), torch.cat([part[1] for part in parts])


def _norms(differences: Tensor, length: Tensor, points: int) -> tuple[Tensor, Tensor]:
    def logits(t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """β d (..., classes − 1) and its log-sum-exp (...)."""
        d = differences[rows] if t.ndim == 1 else differences[rows][:, None]
        scaled = t.exp()[..., None] * d
        return scaled, scaled.logsumexp(-1)

    def height(t: Tensor, rows: Tensor) -> Tensor:
        """log(β (1 − p) / g): as a logarithm it neither over- nor underflows."""
        g = length[rows] if t.ndim == 1 else length[rows][:, None]
        return t + F.logsigmoid(logits(t, rows)[1]) - g.log()

    def slope(t: Tensor, rows: Tensor) -> Tensor:
        """Derivative of `height` by t = log β: 1 + p Σ_j softmax(βd)_j β d_j."""
        scaled, total = logits(t, rows)
        return 1 + torch.sigmoid(-total) * (scaled.softmax(-1) * scaled).sum(-1)

    everyone = torch.arange(len(length), device=length.device)
    low, high = _interval(differences, length)
    weight = torch.linspace(0, 1, points, dtype=length.dtype, device=length.device)
    grid = low[:, None] + (high - low)[:, None] * weight
    between = (grid[:, 1:] + grid[:, :-1]) / 2
    rows, cells = _sign_changes(slope(grid, everyone))
    between[rows, cells] = _bisect(slope, grid[rows, cells], grid[rows, cells + 1], rows)
    # t_0, s_0, t_1, s_1, ...: one monotone piece from each point to the next
    pieces = torch.stack([grid[:, :-1], between], dim=2).flatten(1)
    pieces = torch.cat([pieces, grid[:, -1:]], dim=1)
    heights = height(pieces, everyone)
    rows, cells = _sign_changes(heights)
    roots = _bisect(height, pieces[rows, cells], pieces[rows, cells + 1], rows)
    # below the level everywhere: the summit is closest
    without = everyone[~torch.isin(everyone, rows)]
    summit = heights[without].argmax(1)
    rows = torch.cat([rows, without])
    roots = torch.cat([roots, pieces[without, summit]])
    order = rows.argsort(stable=True)
    return rows[order], roots[order].exp()


def _interval(differences: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Limits of log β, below and above all roots, with a little room for rounding."""
    d, g = differences.cpu().numpy(), length.cpu().numpy()
    low, high = g.copy(), 2 * g
    predicted = d.max(1) < 0  # then β (1 − p) has a summit, and goes back to zero
    near, far = -d[predicted].max(1), -d[predicted].min(1)
    # β (classes − 1) exp(−β near) >= g up to a root that W₋₁ knows; a larger z has it earlier
    z = np.minimum(g[predicted] * near / d.shape[1], 0.3)
    last = -lambertw(-z, -1).real / near
    # The summit may lie below g, and then there is no root. It has
    # 1 <= β far and β near <= 1 + (classes − 1) exp(−β near).
    low[predicted] = np.minimum(low[predicted], 1 / far)
    high[predicted] = np.maximum(high[predicted], 2 * last)
    room = 1e-6
    bounds = np.log(np.stack([low * (1 - room), high * (1 + room)]))
    bottom, top = torch.from_numpy(bounds).to(length.device)
    return bottom, top


def _sign_changes(values: Tensor) -> tuple[Tensor, Tensor]:
    """(row, cell) where a value and the next lie on two sides of zero."""
    positive = values > 0
    rows, cells = (positive[:, 1:] != positive[:, :-1]).nonzero(as_tuple=True)
    return rows, cells


def _bisect(curve: Curve, low: Tensor, high: Tensor, rows: Tensor) -> Tensor:
    """Where `curve` changes its sign between `low` and `high`, to the last digit."""
    start = curve(low, rows) > 0
    for _ in range(64):
        middle = (low + high) / 2
        left = (curve(middle, rows) > 0) == start
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return (low + high) / 2
