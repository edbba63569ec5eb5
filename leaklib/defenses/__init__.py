"""Defenses: transforms of what a client shares, and layers that make it stochastic.

A transform is a frozen setting that is called as ``defense(shared, generator=...)`` and returns a
new :class:`~leaklib.gradients.payload.SharedGradient`; what it is given stays as it was. Victims do
not influence one another: only the random draws of a batch of victims come from one stream.

A bottleneck is part of the model, put there by :func:`insert_bottleneck`;
:func:`partial_perturbation` joins the two.
"""

from leaklib.defenses._base import Defense
from leaklib.defenses.bottleneck import (
    ConvolutionalBottleneck,
    VariationalBottleneck,
    kl_divergence,
)
from leaklib.defenses.clipping import Clip
from leaklib.defenses.compose import Compose, Only
from leaklib.defenses.insertion import insert_bottleneck
from leaklib.defenses.layer_order import (
    BottleneckParts,
    attack_layers,
    bottleneck_parts,
    layer_order,
)
from leaklib.defenses.noise import GaussianNoise, LaplaceNoise
from leaklib.defenses.partial import partial_perturbation
from leaklib.defenses.perturbation import noise_report, perturbation
from leaklib.defenses.pruning import Prune
from leaklib.defenses.quantisation import Quantize, Sign

__all__ = [
    "BottleneckParts",
    "Clip",
    "Compose",
    "ConvolutionalBottleneck",
    "Defense",
    "GaussianNoise",
    "LaplaceNoise",
    "Only",
    "Prune",
    "Quantize",
    "Sign",
    "VariationalBottleneck",
    "attack_layers",
    "bottleneck_parts",
    "insert_bottleneck",
    "kl_divergence",
    "layer_order",
    "noise_report",
    "partial_perturbation",
    "perturbation",
]
