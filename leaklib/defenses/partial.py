"""PPP: a perturbation of the layers that the bottleneck does not protect, and of no other."""

from __future__ import annotations

from typing import Any

from torch import nn

from leaklib.defenses._base import Defense
from leaklib.defenses.compose import Only
from leaklib.defenses.layer_order import attack_layers

__all__ = ["partial_perturbation"]


def partial_perturbation(
    model: nn.Module, defense: Defense, *, image_shape: tuple[int, ...] | None = None, **where: Any
) -> Only:
    """Restrict a defense to the layers before the bottleneck (PRECODE with partial perturbation).

    ĝ_l = T(g_l) for the layers before the bottleneck, ĝ_l = g_l for the bottleneck and all behind
    it, bit by bit. The perturbation's own statistics (a quantile, an rms) are those of the layers
    it sees. `noise_report` says how much of the gradient it covers and how strong it is there.

    Args:
        model: a model with a bottleneck.
        defense: T, such as GaussianNoise(1e-2) or Prune(0.9, scope="tensor").
        image_shape: (channels, height, width).
        **where: `example` and `bottleneck` as in `leaklib.defenses.bottleneck_parts`.

    Returns:
        The defense, to be called as defense(shared, generator=...).

    Raises:
        ValueError: no bottleneck, or nothing before it.

    Source: arXiv 2208.04767; that all layers before the bottleneck are meant is our reading.

    >>> from leaklib.defenses import Sign, insert_bottleneck
    >>> from leaklib.models import build
    >>> model = insert_bottleneck(build("mlp", hidden=(8,)), image_shape=(3, 32, 32))
    >>> partial_perturbation(model, Sign(), image_shape=(3, 32, 32)).layers
    ('hidden1.weight', 'hidden1.bias')
    """
    layers = attack_layers(model, "ignore_bottleneck_and_after", image_shape, **where)
    return Only(layers, defense)
