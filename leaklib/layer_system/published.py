"""The released code's least squares: rows W and K stacked as they are, one dense matrix a victim.

Gradient rows are 100 to 1000 times shorter than weight rows, so this trusts the weight rows, which
carry the error of all layers behind: errors grow about tenfold a layer. It is here to reproduce the
released code's numbers. One thing differs: that code finds the margin μ by 30,000 Adam steps (error
about 2e-5), here it is exact.

Source: Zhu & Blaschko 2021 (R-GAP), Algorithm 1 and released code, which calls a dense singular
value decomposition; the minimiser is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leaklib.layer_system.block import gradient_block
from leaklib.layer_system.geometry import Geometry, unfold
from leaklib.layer_system.operators import LayerSystem

_RIDGE = 1e-10
_MAX_ENTRIES = 1.2e8


def weight_matrix(geometry: Geometry, weight: Tensor) -> Tensor:
    """W as a dense matrix (filters · positions, unknowns). Memory: its size.

    Raises:
        ValueError: more than 1.2e8 entries, about 1 GB.
    """
    entries = math.prod(geometry.output_shape) * geometry.unknowns
    if entries > _MAX_ENTRIES:
        raise ValueError(
            f"expected at most {_MAX_ENTRIES:.1e} entries of a layer's dense weight rows, got "
            f'{entries:.1e}; use solver="auto" and deficient="minimum norm", which need no matrix'
        )
    identity = torch.eye(geometry.unknowns, dtype=weight.dtype, device=weight.device)
    seen = unfold(geometry, identity.view(-1, *geometry.input_shape))
    grouped = weight.reshape(geometry.groups, -1, seen.shape[2])
    return (grouped @ seen).flatten(1).T


def solve_stacked(system: LayerSystem, preactivation: Tensor, weight_grad: Tensor) -> Tensor:
    """Solve min ‖W x − z‖² + ‖K x − ∇W‖², of minimum norm: iterated Tikhonov from zero.

    Each step x ← x + (UᵀU + ρI)⁻¹Uᵀ(b − U x) shrinks the error along a singular value σ by
    ρ/(ρ + σ²) and leaves null directions at zero.

    Args:
        system: the layer, with scale 1.
        preactivation: z without bias (victims, filters, height, width).
        weight_grad: ∂L/∂W (victims, *weight shape).

    Returns:
        (victims, channels, height, width). Cost: one Cholesky decomposition of an
        unknowns x unknowns matrix a victim.
    """
    geometry = system.geometry
    dense = weight_matrix(geometry, system.weight)
    if system.known is None:
        weight_gram = dense.T @ dense
    found = []
    for victim in range(len(preactivation)):
        one = system.select(torch.tensor([victim], device=preactivation.device))
        if system.known is not None:
            rows = dense * system.known[victim].reshape(-1, 1)
            weight_gram = rows.T @ rows
        block = gradient_block(geometry, one.preactivation_grad)[0]
        small = (block.mT @ block).repeat_interleave(
            geometry.input_shape[0] // geometry.groups, dim=0
        )
        gram = weight_gram + torch.block_diag(*small)
        gram.diagonal().add_(_RIDGE * float(gram.diagonal().amax()))
        factor = torch.linalg.cholesky(gram)
        target = one.target(preactivation[[victim]], weight_grad[[victim]])
        x = preactivation.new_zeros(1, *geometry.input_shape)
        for _ in range(20):
            left = tuple(b - a for b, a in zip(target, one.rows(x), strict=True))
            step = torch.cholesky_solve(one.adjoint(left).view(-1, 1), factor).view_as(x)
            x = x + step
            if float(step.norm()) <= 1e-12 * float(x.norm()):
                break
        found.append(x)
    return torch.cat(found)
