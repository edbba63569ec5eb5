"""Models: the papers' networks by name, their initialisations, normalisation inside."""

from leaklib.models.initialisation import initialise_
from leaklib.models.registry import (
    Normalise,
    available_models,
    build,
    parameter_count,
    register,
)
from leaklib.models.residual import ResidualBlock
from leaklib.models.transformer import embedding_table, transformer

__all__ = [
    "Normalise",
    "ResidualBlock",
    "available_models",
    "build",
    "embedding_table",
    "initialise_",
    "parameter_count",
    "register",
    "transformer",
]
