"""Gradients: what a client computes from its private batch, and what of it leaves."""

from leaklib.gradients.client import (
    FedAvg,
    SharedGradient,
    batchnorm_statistics,
    check_payload,
    match_parameters,
    share_gradient,
    update_function,
)

__all__ = [
    "FedAvg",
    "SharedGradient",
    "batchnorm_statistics",
    "check_payload",
    "match_parameters",
    "share_gradient",
    "update_function",
]
