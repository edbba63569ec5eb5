"""Correlations against scipy, the level's cancelling, the interval's coverage."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr

from leaklib.metrics import correlation_table


def noisy_rows(pictures=40, *, seed=0, spread=1.0):
    """Error = noise level x difficulty of the picture x luck."""
    rng = np.random.default_rng(seed)
    difficulty = np.exp(rng.normal(size=pictures))
    rows = []
    for noise in (0.01, 0.1, 1.0):
        luck = np.exp(spread * rng.normal(size=pictures))
        rows += [
            {"noise": noise, "picture": k, "error": noise * difficulty[k] * luck[k],
             "bound": noise * difficulty[k], "norm": noise * np.exp(0.01 * rng.normal()),
             "constant": 1.0}
            for k in range(pictures)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def table(rows, predictors=("bound", "norm", "constant"), **settings):
    found = correlation_table(
        rows, predictors=predictors, outcome="error", level="noise", cluster="picture", **settings
    )
    return found.set_index(["predictor", "scope"])


def test_estimates_equal_scipy():
    rows = noisy_rows()
    found = table(rows, ["bound"], resamples=5)["estimate"]
    pooled = pearsonr(np.log(rows["bound"]), np.log(rows["error"])).statistic
    each = [spearmanr(part["bound"], part["error"]).statistic for _, part in rows.groupby("noise")]
    assert found["bound", "pooled"] == pytest.approx(pooled, rel=1e-12)
    assert found["bound"].iloc[2:].tolist() == pytest.approx(each, rel=1e-12)
    assert found["bound", "within"] == pytest.approx(np.mean(each), rel=1e-12)


def test_the_level_alone_scores_pooled_and_not_within():
    found = table(noisy_rows(200, spread=0.2), resamples=200)
    assert found.loc[("norm", "pooled"), "estimate"] > 0.8
    low, high = found.loc[("norm", "within"), ["low", "high"]]
    assert low < 0 < high
    assert found.loc[("bound", "within"), "low"] > 0.8
    assert np.isnan(found.loc[("constant", "pooled"), "estimate"])
    assert np.isnan(found.loc[("constant", "within"), "low"])


def test_interval_resamples_pictures_not_rows():
    rows = noisy_rows(12)
    thrice = pd.concat([rows, rows, rows], ignore_index=True)  # the same pictures again
    settings = {"predictors": ["bound"], "resamples": 300, "seed": 3}
    once, again = table(rows, **settings), table(thrice, **settings)
    for column in ("low", "high"):
        assert again.loc[("bound", "within"), column] == pytest.approx(
            once.loc[("bound", "within"), column], abs=1e-9
        )


def test_interval_covers():
    truth = table(noisy_rows(4_000, seed=99), ["bound"], resamples=1)["estimate"]["bound", "within"]
    hits = 0
    for seed in range(40):
        row = table(noisy_rows(40, seed=seed), ["bound"], resamples=60).loc[("bound", "within")]
        hits += row["low"] <= truth <= row["high"]
    assert hits >= 34  # 38 expected at 95 %; fewer than 34 has probability 0.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bound": -1.0}, "positive"),
        ({"bound": np.inf}, "finite"),
        ({"picture": 0}, "three clusters"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        table(noisy_rows().assign(**change), ["bound"])


def test_unknown_column_and_confidence_are_refused():
    with pytest.raises(ValueError, match="nothing"):
        table(noisy_rows(), ["nothing"])
    with pytest.raises(ValueError, match="confidence"):
        table(noisy_rows(), ["bound"], confidence=1.5)
