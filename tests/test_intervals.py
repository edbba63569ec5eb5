"""Intervals against scipy and against distributions that can be written down."""

import doctest

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import leaklib.metrics.intervals
from leaklib.metrics.intervals import bootstrap_interval, success_rate


def test_doctests():
    assert doctest.testmod(leaklib.metrics.intervals).failed == 0


@settings(deadline=None, derandomize=True)
@given(
    n=st.integers(1, 400),
    share=st.floats(0, 1),
    confidence=st.sampled_from([0.5, 0.9, 0.95, 0.999]),
)
def test_wilson_equals_scipy(n, share, confidence):
    successes = round(share * n)
    values = np.r_[np.ones(successes), np.zeros(n - successes)]
    rate = success_rate(values, threshold=0.5, confidence=confidence)
    expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (rate.successes, rate.n, rate.confidence) == (successes, n, confidence)
    assert rate.estimate == successes / n
    assert rate.low == pytest.approx(expected.low, abs=1e-12)
    assert rate.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= rate.low <= rate.estimate <= rate.high <= 1


def test_success_includes_the_threshold_in_both_directions():
    values = [29.9, 30.0, 30.1]
    assert success_rate(values, threshold=30.0).successes == 2
    assert success_rate(values, threshold=30.0, higher_is_better=False).successes == 2


def test_infinite_scores_and_diverged_attacks():
    values = torch.tensor([[float("inf"), float("nan")], [31.0, -float("inf")]])
    rate = success_rate(values, threshold=30.0)
    assert (rate.successes, rate.n) == (2, 4)
    low = success_rate(values, threshold=30.0, higher_is_better=False)
    assert (low.successes, low.n) == (1, 4)


def test_bfloat16_and_gradients_are_read():
    values = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    assert success_rate(values, threshold=0.5).successes == 1


def test_rate_prints_counts_and_interval():
    assert str(success_rate([1] * 18 + [0] * 2, threshold=1)) == "18/20 = 90% [70%, 97%]"


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {"threshold": 1.0}, "at least one value"),
        ([1.0], {"threshold": float("nan")}, "threshold, got NaN"),
        ([1.0], {"threshold": 1.0, "confidence": 95}, "confidence in \\(0, 1\\), got 95"),
        ([1.0], {"threshold": 1.0, "confidence": 0.0}, "confidence"),
    ],
)
def test_success_rate_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        success_rate(values, **options)


# The mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4; the median of
# three draws from {0, 1, 2} is 0, 1, 2 with probability 7/27, 13/27, 7/27.
@pytest.mark.parametrize(
    ("values", "statistic", "confidence", "expected"),
    [
        ([0, 1], "mean", 0.40, (0.5, 0.5)),
        ([0, 1], "mean", 0.60, (0.0, 1.0)),
        ([0, 1, 2], "median", 0.40, (1.0, 1.0)),
        ([0, 1, 2], "median", 0.60, (0.0, 2.0)),
        ([0, 1, 2], np.max, 0.10, (2.0, 2.0)),
    ],
)
def test_bootstrap_of_a_known_distribution(values, statistic, confidence, expected):
    interval = bootstrap_interval(values, statistic, confidence=confidence)
    assert (interval.low, interval.high) == expected
    assert (interval.n, interval.confidence) == (len(values), confidence)


@pytest.mark.parametrize(("statistic", "function"), [("mean", np.mean), ("median", np.median)])
def test_bootstrap_agrees_with_scipy(statistic, function):
    values = np.random.default_rng(3).gamma(2.0, size=60)
    ours = bootstrap_interval(values, statistic, resamples=20_000, confidence=0.9)
    theirs = scipy.stats.bootstrap(
        (values,),
        function,
        n_resamples=20_000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours.estimate == function(values)
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width


def test_bootstrap_in_blocks_draws_all_resamples(monkeypatch):
    values = np.arange(50.0)
    calls = []

    def counting_mean(sample, axis):
        calls.append(sample.shape)
        return np.mean(sample, axis=axis)

    monkeypatch.setattr(leaklib.metrics.intervals, "_BLOCK", 50 * 30)
    blocked = bootstrap_interval(values, counting_mean, resamples=100)
    assert calls == [(30, 50), (30, 50), (30, 50), (10, 50), (50,)]
    assert blocked.low < 24.5 < blocked.high


def test_bootstrap_is_reproducible_by_seed():
    values = torch.linspace(0, 1, 20)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least one value"),
        ([1.0, float("inf"), float("nan")], {}, "got 2 of 3"),
        ([1.0], {"resamples": 0}, "resamples >= 1"),
        ([1.0], {"confidence": 1.0}, "confidence"),
        ([1.0], {"statistic": "mode"}, "'mode'"),
    ],
)
def test_bootstrap_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)
