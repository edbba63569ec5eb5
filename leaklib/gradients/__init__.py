"""Gradients: what a client computes from its private batch, and what of it leaves."""

from leaklib.gradients.client import share_gradient, update_function
from leaklib.gradients.payload import (
    FedAvg,
    SharedGradient,
    check_payload,
    concatenate,
    match_parameters,
)
from leaklib.gradients.stateless import batchnorm_statistics
from leaklib.gradients.stochastic import add_losses, collected_losses, draw_noise

__all__ = [
    "FedAvg",
    "SharedGradient",
    "add_losses",
    "batchnorm_statistics",
    "check_payload",
    "collected_losses",
    "concatenate",
    "draw_noise",
    "match_parameters",
    "share_gradient",
    "update_function",
]
