"""Metrics: how close a reconstruction is, and how sure we are of a rate."""

from leaklib.metrics.correlation import correlation_table
from leaklib.metrics.intervals import Interval, Rate, bootstrap_interval, success_rate
from leaklib.metrics.scores import label_accuracy, match_batch, score, success_table
from leaklib.metrics.similarity import lpips, mse, psnr_db, ssim
from leaklib.metrics.text import rouge_1, rouge_l, token_accuracy

__all__ = [
    "Interval",
    "Rate",
    "bootstrap_interval",
    "correlation_table",
    "label_accuracy",
    "lpips",
    "match_batch",
    "mse",
    "psnr_db",
    "rouge_1",
    "rouge_l",
    "score",
    "ssim",
    "success_rate",
    "success_table",
    "token_accuracy",
]
