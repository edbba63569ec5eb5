"""Defenses that transform what a client shares, before it leaves the client.

Each is a frozen setting that is called as ``defense(shared, generator=...)`` and returns a new
:class:`~leaklib.gradients.payload.SharedGradient`; what it is given stays as it was. Victims do not
influence one another: only the random draws of a batch of victims come from one stream.
"""

from leaklib.defenses._base import Defense
from leaklib.defenses.clipping import Clip
from leaklib.defenses.compose import Compose, Only
from leaklib.defenses.noise import GaussianNoise, LaplaceNoise
from leaklib.defenses.perturbation import noise_report, perturbation
from leaklib.defenses.pruning import Prune
from leaklib.defenses.quantisation import Quantize, Sign

__all__ = [
    "Clip",
    "Compose",
    "Defense",
    "GaussianNoise",
    "LaplaceNoise",
    "Only",
    "Prune",
    "Quantize",
    "Sign",
    "noise_report",
    "perturbation",
]
