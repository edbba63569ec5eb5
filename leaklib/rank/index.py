"""One number for a network: the layer-wise security index of its rank deficits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Rounding = Literal["none", "published"]


def security_index(
    deficits: Sequence[int],
    *,
    unknowns: Sequence[int] | None = None,
    rounding: Rounding = "none",
) -> float:
    """Layer-wise security index c(M) <= 0: 0 where every layer can be solved.

        c(M) = Σ_{i=1..d} (d − (i − 1))/d · RA_i,   RA_i = rank [W_i; K_i] − n_i.

    Layers next to the image weigh most. It compares networks of different sizes poorly, because it
    grows with n_i, and does not know that other equations may fill a deficit. With `unknowns` every
    deficit is divided by n_i first.

    Args:
        deficits: RA_1 ... RA_d of the d convolutions, the one next to the image first. Fully
            connected layers, which are always solvable, are left out.
        unknowns: n_1 ... n_d for the normalised index, between −(d + 1)/2 and 0.
        rounding: "published" rounds each term to an integer, halves to the even one, as COPA's code
            does.

    Returns:
        c(M).

    Raises:
        ValueError: a positive deficit, no n_i for each, an unknown rounding, or rounding of the
            normalised index, whose terms are below 1.

    Source: Zhu & Blaschko 2021 (R-GAP), section 3.1.2; rounding: Chen & Campbell 2022 (COPA).

    R-GAP's CNN6-d is short of 280 equations in the second of six layers:

    >>> round(security_index([0, -280, 0, 0, 0, 0]), 2)
    -233.33
    >>> security_index([0, -4533], rounding="published")  # −2266.5
    -2266.0
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding: expected one of {get_args(Rounding)}, got {rounding!r}")
    if any(deficit > 0 for deficit in deficits):
        raise ValueError(
            f"deficits: expected rank − unknowns, at most 0, got {list(deficits)}; pass the rank "
            "deficits, not the naive count of equations"
        )
    count = len(deficits)
    weights = [(count - place) / count for place in range(count)]
    if unknowns is None:
        terms = [weight * deficit for weight, deficit in zip(weights, deficits, strict=True)]
    else:
        if len(unknowns) != count or min(unknowns, default=1) < 1:
            raise ValueError(
                f"unknowns: expected {count} numbers of at least 1, got {list(unknowns)}"
            )
        if rounding != "none":
            raise ValueError('expected rounding="none" for the normalised index: its terms are < 1')
        terms = [w * d / n for w, d, n in zip(weights, deficits, unknowns, strict=True)]
    if rounding == "published":
        terms = [float(round(term)) for term in terms]
    # + 0.0: a sum of −0.0 prints as 0.0
    return sum(terms) + 0.0
