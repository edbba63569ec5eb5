"""Models: the papers' networks by name, their initialisations, normalisation inside."""

from leaklib.models.initialisation import initialise_
from leaklib.models.registry import (
    Normalise,
    available_models,
    build,
    parameter_count,
    register,
)

__all__ = [
    "Normalise",
    "available_models",
    "build",
    "initialise_",
    "parameter_count",
    "register",
]
