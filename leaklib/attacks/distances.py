"""Distances between two gradients, with their derivative in closed form.

Each function takes a gradient and its target, name -> tensor of one client, and returns the value
and the cotangent ∂D/∂g. The image gradient of any matching attack is then one product with the
Jacobian of the gradient, ∂D/∂x = J (∂D/∂g): no autograd graph over the distance, and fewer passes
over memory than differentiating it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from leaklib.gradients.payload import match_parameters

Grads = Mapping[str, Tensor]
Distance = Callable[[Grads, Grads, Mapping[str, float]], tuple[Tensor, dict[str, Tensor]]]
DistanceName = Literal["l2", "cosine", "layer_cosine"]


def l2(
    grads: Grads, target: Grads, weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """D = Σ_l w_l ‖g_l − ĝ_l‖², ∂D/∂g_l = 2 w_l (g_l − ĝ_l).

    Source: Zhu, Liu & Han 2019 (DLG), with all weights 1.
    """
    residual = {n: g - target[n] for n, g in grads.items()}
    value = torch.stack([weights[n] * _dot(r, r) for n, r in residual.items()]).sum()
    return value, {n: 2 * weights[n] * r for n, r in residual.items()}


def cosine(
    grads: Grads, target: Grads, weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """D = 1 − ⟨g, ĝ⟩ / (‖g‖ ‖ĝ‖) over all tensors together, inner products weighted by w_l.

    Source: Geiping et al. 2020, Eq. 4, with all weights 1.
    """
    inner = torch.stack([weights[n] * _dot(g, target[n]) for n, g in grads.items()]).sum()
    norm = torch.stack([weights[n] * _dot(g, g) for n, g in grads.items()]).sum()
    fixed = torch.stack([weights[n] * _dot(target[n], target[n]) for n in grads]).sum()
    norm, fixed = positive(norm).sqrt(), positive(fixed).sqrt()
    similarity = inner / (norm * fixed)
    along, across = similarity / norm**2, 1 / (norm * fixed)
    cotangent = {n: weights[n] * (along * g - across * target[n]) for n, g in grads.items()}
    return 1 - similarity, cotangent


def layer_cosine(
    grads: Grads, target: Grads, weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """D = Σ_l w_l (1 − cos(g_l, ĝ_l)): every tensor counts alike, however small its gradient."""
    value, cotangent = [], {}
    for name, g in grads.items():
        one, part = cosine({name: g}, target, {name: 1.0})
        value.append(weights[name] * one)
        cotangent[name] = weights[name] * part[name]
    return torch.stack(value).sum(), cotangent


DISTANCES: dict[str, Distance] = {"l2": l2, "cosine": cosine, "layer_cosine": layer_cosine}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a.flatten() @ b.flatten()


def positive(squared_norm: Tensor) -> Tensor:
    """Keep a dead network's zero gradient from dividing by zero."""
    return squared_norm.clamp_min(torch.finfo(squared_norm.dtype).tiny ** 0.5)


def tensor_weights(names: Iterable[str], layer_weights: Mapping[str, float]) -> dict[str, float]:
    """Weight of each compared tensor, 1 unless named; a layer named twice takes the last word.

    Raises:
        ValueError: a negative weight, or a layer that matches nothing.

    >>> tensor_weights(["conv1.weight", "fc.weight", "fc.bias"], {"fc": 2, "fc.bias": 0})
    {'conv1.weight': 1.0, 'fc.weight': 2.0, 'fc.bias': 0.0}
    """
    weights = dict.fromkeys(names, 1.0)
    for layer, weight in layer_weights.items():
        if not weight >= 0:
            raise ValueError(f"expected a weight >= 0 for layer {layer!r}, got {weight}")
        for name in match_parameters(weights, [layer]):
            weights[name] = float(weight)
    return weights
