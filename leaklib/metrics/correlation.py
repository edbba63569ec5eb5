"""Does a prediction order the outcomes? Pooled over levels, and within one level."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import rankdata

from leaklib.metrics.intervals import check_confidence

Array = npt.NDArray[np.float64]


def correlation_table(
    rows: pd.DataFrame,
    *,
    predictors: Sequence[str],
    outcome: str,
    level: str,
    cluster: str,
    resamples: int = 1_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation of several predictors with one outcome, pooled and within a level.

    ``pooled`` is Pearson's r of the logarithms over all rows: whatever grows with the level scores
    high there. ``within`` is the mean over levels of Spearman's ρ, in which the level cancels: it
    asks which picture is worse off at the same noise. Intervals are percentile bootstraps over
    clusters, because the rows of one picture are not independent.

    Args:
        rows: One row per attack; rows with a missing number are left out.
        predictors: Columns that predict; positive and finite.
        outcome: Column to be predicted; positive and finite.
        level: Column of the level, e.g. the noise variance.
        cluster: Column that names the picture.
        resamples: Draws of the bootstrap.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Seed of the draws.

    Returns:
        Table with the columns ``predictor``, ``scope`` ("pooled", "within", then one row per level
        with that level's ρ), ``estimate``, ``low``, ``high``, ``n``. A constant predictor has no
        correlation: NaN, or the mean of the levels where it is defined.

    Raises:
        ValueError: An unknown column, a value that is not positive and finite, fewer than three
            clusters or a confidence out of range.

    A prediction that is right up to a factor orders every level:

    >>> rows = pd.DataFrame({"noise": [1, 1, 1, 2, 2, 2], "picture": [0, 1, 2, 0, 1, 2],
    ...                      "error": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    >>> rows["bound"] = 0.5 * rows["error"]
    >>> found = correlation_table(rows, predictors=["bound"], outcome="error", level="noise",
    ...                           cluster="picture", resamples=10)
    >>> found[["scope", "estimate"]].head(2).round(3).values.tolist()
    [['pooled', 1.0], ['within', 1.0]]
    """
    check_confidence(confidence)
    needed = [*predictors, outcome, level, cluster]
    if missing := [name for name in needed if name not in rows.columns]:
        raise ValueError(f"expected the columns {needed}, got none called {missing}")
    rows = rows.dropna(subset=needed)
    usable = rows[[*predictors, outcome]].apply(lambda c: c.between(0, np.inf, "neither").all())
    if bad := list(usable.index[~usable]):
        raise ValueError(
            f"expected positive, finite values for logarithms, got others in {bad}; leave out or "
            "clip what diverged"
        )
    names, of_row = np.unique(rows[cluster].to_numpy(), return_inverse=True)
    if len(names) < 3:
        raise ValueError(f"expected at least three clusters, got {len(names)}; attack more")
    levels, at = np.unique(rows[level].to_numpy(), return_inverse=True)
    x = rows[list(predictors)].to_numpy(dtype=float).T  # (predictors, rows)
    y = rows[outcome].to_numpy(dtype=float)
    members = [np.flatnonzero(of_row == k) for k in range(len(names))]

    def measure(chosen: npt.NDArray[np.intp]) -> Array:
        """(predictors, 2 + levels): pooled, mean within, then each level."""
        pooled = _pearson(np.log(x[:, chosen]), np.log(y[chosen]))
        parts = [chosen[at[chosen] == k] for k in range(len(levels))]
        each = np.stack([_spearman(x[:, part], y[part]) for part in parts], axis=1)
        defined = np.isfinite(each)
        total = np.where(defined, each, 0).sum(1)
        count = defined.sum(1)
        within = np.divide(total, count, out=np.full(len(x), np.nan), where=count > 0)
        return np.column_stack([pooled, within, each])

    everything = np.arange(len(y))
    estimate = measure(everything)
    rng = np.random.default_rng(seed)
    draws = np.stack(
        [
            measure(np.concatenate([members[k] for k in rng.integers(len(names), size=len(names))]))
            for _ in range(resamples)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = _quantiles(draws, tail), _quantiles(draws, 1 - tail)
    scopes = ["pooled", "within", *(str(name) for name in levels)]
    counts = [len(y), len(y), *np.bincount(at)]
    return pd.DataFrame(
        [
            (name, scope, estimate[i, j], low[i, j], high[i, j], int(counts[j]))
            for i, name in enumerate(predictors)
            for j, scope in enumerate(scopes)
        ],
        columns=["predictor", "scope", "estimate", "low", "high", "n"],
    )


def _pearson(x: Array, y: Array) -> Array:
    """Correlation of every row of x with y; NaN where one of them is constant."""
    if y.size < 2:
        return np.full(len(x), np.nan)
    x, y = x - x.mean(1, keepdims=True), y - y.mean()
    scale = np.sqrt((x**2).sum(1) * (y**2).sum())
    # a constant leaves rounding behind, not zero
    flat = scale <= 1e-12 * np.abs(y).max(initial=0) * max(1.0, np.abs(x).max(initial=0)) * y.size
    return np.divide(x @ y, scale, out=np.full(len(x), np.nan), where=~flat)


def _spearman(x: Array, y: Array) -> Array:
    if y.size < 3:
        return np.full(len(x), np.nan)
    return _pearson(rankdata(x, axis=1), rankdata(y))


def _quantiles(draws: Array, q: float) -> Array:
    """Quantile over the draws where the statistic was defined; NaN where it never was."""
    defined = np.isfinite(draws).any(0)
    filled = np.where(defined, draws, 0.0)
    return np.where(defined, np.nanquantile(filled, q, axis=0), np.nan)
