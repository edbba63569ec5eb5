"""What an attacker expects of a picture: smoothness, and the network's own input statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from leaklib.gradients.payload import Statistics


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, horizontal plus vertical.

    TV(x) = mean|x[…, i+1, j] − x[…, i, j]| + mean|x[…, i, j+1] − x[…, i, j]|.
    Source: the released code of Geiping et al. 2020, an anisotropic mean.

    Args:
        images: (..., channels, height, width).

    Returns:
        A scalar, the mean over everything.

    >>> total_variation(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
    tensor(1.)
    """
    down = (images[..., 1:, :] - images[..., :-1, :]).abs()
    right = (images[..., 1:] - images[..., :-1]).abs()
    return _mean(down) + _mean(right)


def statistics_distance(measured: Statistics, known: Statistics) -> Tensor:
    """Σ_l ‖mean_l − mean̂_l‖₂ + ‖var_l − var̂_l‖₂ over the BatchNorm layers.

    Source: Yin et al. 2021 (GradInversion), the R_BN term.

    Args:
        measured: layer -> (mean, variance) of the dummy batch.
        known: the same of the private batch, or the model's running statistics.

    Returns:
        A scalar.
    """
    terms = []
    for name, (mean, variance) in known.items():
        terms.append(_norm(measured[name][0] - mean) + _norm(measured[name][1] - variance))
    return torch.stack(terms).sum()


def _mean(differences: Tensor) -> Tensor:
    """Mean that is zero, not NaN, for an image one pixel wide."""
    return differences.sum() / max(1, differences.numel())


def _norm(vector: Tensor) -> Tensor:
    """Euclidean norm with a finite derivative at zero."""
    return (vector.square().sum() + torch.finfo(vector.dtype).tiny ** 0.5).sqrt()
