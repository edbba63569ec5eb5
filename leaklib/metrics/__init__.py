"""Metrics: how close a reconstruction is, and how sure we are of a rate."""

from leaklib.metrics.scores import (
    Interval,
    Rate,
    bootstrap_interval,
    label_accuracy,
    lpips,
    match_batch,
    mse,
    psnr_db,
    score,
    ssim,
    success_rate,
)

__all__ = [
    "Interval",
    "Rate",
    "bootstrap_interval",
    "label_accuracy",
    "lpips",
    "match_batch",
    "mse",
    "psnr_db",
    "score",
    "ssim",
    "success_rate",
]
