"""How sure a success rate or a mean is: Wilson and bootstrap intervals.

A study of twenty attacks cannot tell 80 % from 95 %; every rate and every mean is therefore
reported with its interval. Both intervals take the values as independent: repeated attacks on the
same picture are not, and their interval is then too narrow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Interval", "Rate", "bootstrap_interval", "success_rate"]

# Entries of one block of resamples: bounds the memory of the bootstrap to tens of megabytes.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Rate:
    """A share of successes with its confidence interval; everything in [0, 1].

    Attributes:
        estimate: Successes over trials.
        low: Lower end of the interval.
        high: Upper end of the interval.
        successes: Number of successes.
        n: Number of trials.
        confidence: Coverage that the interval aims at.
    """

    estimate: float
    low: float
    high: float
    successes: int
    n: int
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.successes}/{self.n} = {self.estimate:.0%} [{self.low:.0%}, {self.high:.0%}]"


@dataclass(frozen=True)
class Interval:
    """A statistic of a sample with its confidence interval.

    Attributes:
        estimate: The statistic of the sample itself.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of values.
        confidence: Coverage that the interval aims at.
    """

    estimate: float
    low: float
    high: float
    n: int
    confidence: float = 0.95


def success_rate(
    values: npt.ArrayLike | torch.Tensor,
    *,
    threshold: float,
    higher_is_better: bool = True,
    confidence: float = 0.95,
) -> Rate:
    """Share of attacks that reach a threshold, with Wilson's score interval.

    A success is ``value >= threshold``, or ``value <= threshold`` when lower is better. With k
    successes out of n, p = k/n and z the normal quantile at (1 + confidence)/2, the interval is

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).

    NaN counts as a failure: it is the score of an attack that diverged, and leaving it out would
    make an unstable attack look better than it is.

    Args:
        values: Scores of any shape, one per attack.
        threshold: What a success reaches, in the unit of the values.
        higher_is_better: True for PSNR and SSIM, False for MSE and LPIPS.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The rate, its interval and its counts.

    Raises:
        ValueError: There is no value, the threshold is NaN, or the confidence is outside (0, 1).

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927) 209-212.

    Four successes out of four still leave room down to 1/(1 + z²/4), about one half:

    >>> rate = success_rate([31.0, 40.0, float("inf"), 30.0], threshold=30.0)
    >>> (rate.estimate, round(rate.low, 4), rate.high)
    (1.0, 0.5101, 1.0)
    >>> print(success_rate([31.0, float("nan")], threshold=30.0))
    1/2 = 50% [9%, 91%]
    """
    scores = _as_float64(values)
    check_confidence(confidence)
    if scores.size == 0:
        raise ValueError("expected at least one value, got none; score an attack first")
    if math.isnan(threshold):
        raise ValueError("expected a number as threshold, got NaN; say what counts as a success")

    reached = scores >= threshold if higher_is_better else scores <= threshold  # NaN: False
    n, successes = scores.size, int(reached.sum())
    p = successes / n
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = p + z2 / (2 * n)
    half_width = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2)))
    # At the two ends one bound is exactly 0 or 1; rounding would leave 1e-17.
    low = 0.0 if successes == 0 else (centre - half_width) / (1 + z2 / n)
    high = 1.0 if successes == n else (centre + half_width) / (1 + z2 / n)
    return Rate(p, low, high, successes, n, confidence)


def bootstrap_interval(
    values: npt.ArrayLike | torch.Tensor,
    statistic: Literal["mean", "median"] | Callable[..., Any] = "mean",
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a statistic.

    The values are drawn with replacement, n at a time, ``resamples`` times; the interval runs
    between the (1 − confidence)/2 and (1 + confidence)/2 quantiles of the statistic of the draws.
    Below about ten values it is too narrow.

    Args:
        values: A sample of any shape, flattened; finite.
        statistic: ``"mean"``, ``"median"`` or a function like ``numpy.std`` that takes an array
            and ``axis``.
        seed: Seed of the draws: the same seed gives the same interval.
        resamples: Number of draws.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The statistic of the sample and its interval.

    Raises:
        ValueError: No value, a value that is not finite, an unknown statistic, or a setting out
            of range.

    Cost: ``resamples`` times n draws, in blocks of bounded memory.

    Source: B. Efron, The Annals of Statistics 7 (1979) 1-26.

    A constant sample leaves no doubt:

    >>> bootstrap_interval([2.0, 2.0, 2.0])
    Interval(estimate=2.0, low=2.0, high=2.0, n=3, confidence=0.95)
    """
    sample = _as_float64(values).ravel()
    check_confidence(confidence)
    if sample.size == 0:
        raise ValueError("expected at least one value, got none; score an attack first")
    if not np.isfinite(sample).all():
        bad = int((~np.isfinite(sample)).sum())
        raise ValueError(
            f"expected finite values, got {bad} of {sample.size} that are not; "
            "cap an infinite PSNR, and report diverged attacks through success_rate"
        )
    if resamples < 1:
        raise ValueError(f"expected resamples >= 1, got {resamples}; 10000 is usual")
    named: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}
    function = named.get(statistic) if isinstance(statistic, str) else statistic
    if function is None:
        raise ValueError(
            f"expected the statistic 'mean', 'median' or a function, got {statistic!r}; "
            "pass a function of (array, axis) for another one"
        )

    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // sample.size)
    draws = [
        function(sample[rng.integers(sample.size, size=(rows, sample.size))], axis=-1)
        for rows in (min(block, resamples - start) for start in range(0, resamples, block))
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return Interval(
        float(function(sample, axis=-1)), float(low), float(high), sample.size, confidence
    )


def _as_float64(values: npt.ArrayLike | torch.Tensor) -> npt.NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        # bfloat16 has no numpy counterpart: widen before leaving torch.
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def check_confidence(confidence: float) -> None:
    """Refuse a coverage outside (0, 1).

    Raises:
        ValueError: with the usual value.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence in (0, 1), got {confidence}; 0.95 is usual")
