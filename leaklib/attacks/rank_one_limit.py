"""How much noise `rank_one` bears: a threshold that can be read off the clean gradient.

A matrix of rank one and length s in independent noise of standard deviation σ shows in the singular
vectors of the sum only if s > σ (mn)^¼, m and n its rows and columns; above, the cosine between the
true and the found right vector v is known in the limit of large matrices. This is the threshold of
the spiked random matrix model, quoted from memory; the tests compare it with simulations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noise_limit(weight_grad: Tensor, bias_grad: Tensor) -> Tensor:
    """Standard deviation from which on the singular vector tells nothing: σ* = s / (mn)^¼.

    s = ‖[∂L/∂W | ∂L/∂b]‖ of one image, m outputs, n inputs and the bias: σ* = rms · (mn)^¼, where
    rms is that of the layer's gradient. A client can work it out before it chooses σ.

    Args:
        weight_grad: of the first layer, clean, (..., outputs, inputs).
        bias_grad: (..., outputs).

    Returns:
        (...), float64.

    >>> weight, bias = torch.full((1, 4, 3), 0.5), torch.full((1, 4), 0.5)
    >>> noise_limit(weight, bias)
    tensor([1.], dtype=torch.float64)
    """
    joint = torch.cat([weight_grad, bias_grad[..., None]], dim=-1).double()
    entries = joint.shape[-2] * joint.shape[-1]
    return torch.linalg.vector_norm(joint, dim=(-2, -1)) / entries**0.25


def expected_overlap(weight_grad: Tensor, bias_grad: Tensor, *, std: float) -> Tensor:
    """Expected squared cosine between the found and the true [x | 1], under Gaussian noise.

    cos² = 1 − (β + θ²) / (θ² (θ² + 1)) for θ⁴ > β, else 0, with θ = s / (σ √n) and β = m/n.

    Args:
        weight_grad: of the first layer, clean, (..., outputs, inputs).
        bias_grad: (..., outputs).
        std: σ >= 0 of the noise on every entry.

    Returns:
        (...), float64, in [0, 1]; 1 without noise.

    Raises:
        ValueError: a negative std or NaN.

    >>> weight, bias = torch.full((1, 4, 3), 0.5), torch.full((1, 4), 0.5)
    >>> expected_overlap(weight, bias, std=0.0), expected_overlap(weight, bias, std=1.0)
    (tensor([1.], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """
    if not std >= 0:
        raise ValueError(f"expected std >= 0, got {std}")
    outputs, inputs = weight_grad.shape[-2], weight_grad.shape[-1] + 1
    ratio = outputs / inputs
    length = noise_limit(weight_grad, bias_grad) * (outputs * inputs) ** 0.25
    if std == 0:
        return torch.ones_like(length)
    square = (length / std).square() / inputs  # θ²
    overlap = 1 - (ratio + square) / (square * (square + 1))
    return torch.where(square.square() > ratio, overlap, 0.0)
