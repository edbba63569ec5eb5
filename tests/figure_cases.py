"""Toy tables and images, and every figure function with little and with much to draw."""

import numpy as np
import pandas as pd
import torch

from leaklib import figures

ENDS = {"estimate": "estimate", "low": "low", "high": "high"}
DOTS = {"value": "estimate", "low": "low", "high": "high"}


def images(victims, channels=3, size=8, seed=0):
    return torch.rand(victims, channels, size, size, generator=torch.Generator().manual_seed(seed))


def frames(victims, across, channels=3, size=8):
    return images(victims * across, channels, size).reshape(victims, across, channels, size, size)


def rates(rows):
    """Rows of (category, hue, rate) with an interval of a tenth to each side, inside [0,1]."""
    table = pd.DataFrame(rows, columns=["network", "attack", "estimate"])
    table["low"] = (table.estimate - 0.1).clip(lower=0)
    table["high"] = (table.estimate + 0.1).clip(upper=1)
    table["n"] = 20 + table.index
    return table


ATTACKS = ["DLG", "iDLG", "cosine + TV", "analytic"]
ONE = rates([("LeNet", "DLG", 0.9)])
MANY = rates(
    [
        (
            f"network {k} with batch normalisation in evaluation mode",
            attack,
            ((3 * k + i) % 11) / 10,
        )
        for k in range(8)
        for i, attack in enumerate(ATTACKS)
    ]
)
GROUPED = pd.DataFrame(
    [
        (factor, setting, 0.1 * i, 0.0, 0.1 * i + 0.1)
        for factor in ("activation", "batch_size", "init")
        for i, setting in enumerate(("default", "uniform(-0.5, 0.5), as in the authors' code", "8"))
    ],
    columns=["factor", "setting", "estimate", "low", "high"],
)
NOISE = pd.DataFrame(
    [
        (attack, noise, 1 - 0.2 * i - 0.01 * k, 0.9 - 0.2 * i - 0.01 * k, 1 - 0.2 * i)
        for k, attack in enumerate(ATTACKS)
        for i, noise in enumerate([0.0, 1e-4, 1e-3, 1e-2, 1e-1])
    ],
    columns=["attack", "noise", "estimate", "low", "high"],
)
NOISE["low"] = NOISE.low.clip(lower=0.0)
CURVES = pd.DataFrame(
    [
        (attack, victim, x, 10.0 ** (1 - k) / (x + victim + 1))
        for k, attack in enumerate(ATTACKS)
        for victim in range(5)
        for x in (0, 1, 10, 100 + victim, 1000 + 7 * victim)
    ],
    columns=["attack", "victim", "evaluations", "objective"],
)
HOLED = CURVES.assign(objective=CURVES.objective.where(CURVES.victim != 2, np.nan))
NOT_A_NUMBER = images(3)
NOT_A_NUMBER[1, 0, 2, 2] = float("nan")
X = np.geomspace(1e-3, 1e2, 40)
LONG = ["hubble_deep_field", "a handwritten zero", "x"]

FIGURES = {
    "strip of one": lambda: figures.frames_strip(images(1), frames(1, 1), counts=[0]),
    "strip of grey, many": lambda: figures.frames_strip(
        images(9, 1),
        frames(9, 8, 1),
        counts=[0, 10, 100, 1000, 2000, 2500, 10_000, 24_000],
        captions=np.linspace(3, 50, 72).reshape(9, 8),
        row_labels=LONG * 3,
    ),
    "strip of failures": lambda: figures.frames_strip(
        images(3), torch.stack([NOT_A_NUMBER] * 4, 1), counts=range(4), captions=[["a"] * 4] * 3
    ),
    "strip in a column": lambda: figures.frames_strip(
        images(2, size=32), frames(2, 4, size=32), counts=[1, 2, 3, 4], width="column"
    ),
    "grid of one": lambda: figures.reconstruction_grid({"private": images(1)}),
    "grid of many": lambda: figures.reconstruction_grid(
        {"private": images(19), "cosine + TV with restarts": images(19, seed=1)},
        captions={"cosine + TV with restarts": [31.4159] * 18 + [float("inf")]},
        column_labels=(LONG * 7)[:19],
    ),
    "grid of failures": lambda: figures.reconstruction_grid(
        {"private": images(3, 1), "DLG": NOT_A_NUMBER},
        captions={"DLG": torch.tensor([5.0, float("nan"), 31.25])},
    ),
    "grid of MNIST size": lambda: figures.reconstruction_grid({"private": images(8, 1, 28)}),
    "convergence of one run": lambda: figures.convergence(
        CURVES[(CURVES.victim == 0) & (CURVES.attack == "DLG")], y="objective", role="dlg"
    ),
    "convergence of many": lambda: figures.convergence(
        CURVES, y="objective", hue="attack", reference=1e-2, reference_label="threshold"
    ),
    "convergence, linear": lambda: figures.convergence(
        HOLED, y="objective", hue="attack", log_x=False, log_y=False, width="page"
    ),
    "bar": lambda: figures.rate_bars(ONE, category="network", **ENDS, width="column"),
    "bars of many": lambda: figures.rate_bars(
        MANY, category="network", hue="attack", n="n", **ENDS
    ),
    "bars in groups": lambda: figures.rate_bars(
        GROUPED, category="setting", group="factor", **ENDS, role="dlg"
    ),
    "dot": lambda: figures.dot_intervals(ONE, category="network", **DOTS),
    "dots of many": lambda: figures.dot_intervals(
        MANY, category="network", hue="attack", n="n", reference=0.3, reference_label="0.3", **DOTS
    ),
    "rate line of one point": lambda: figures.rate_lines(NOISE[:1], x="noise", **ENDS),
    "rate lines": lambda: figures.rate_lines(
        NOISE, x="noise", hue="attack", log_x=True, x_label="noise", **ENDS
    ),
    "rate lines at crowded places": lambda: figures.rate_lines(
        NOISE, x="noise", hue="attack", **ENDS
    ),
    "scatter of one": lambda: figures.identity_scatter([1.0], [2.0], x_label="x", y_label="y"),
    "scatter of many": lambda: figures.identity_scatter(
        X, torch.tensor(X) * 2, x_label="I²F", y_label="RMSE", hue=ATTACKS * 10, hue_label="attack"
    ),
    "panels": lambda: panels(),
}


def panels():
    figure, axes = figures.make_axes(width="page", columns=2, height=3.4)
    figures.convergence(CURVES, y="objective", hue="attack", ax=axes[0, 0], legend="figure")
    figures.rate_lines(
        NOISE, x="noise", hue="attack", log_x=True, **ENDS, ax=axes[0, 1], legend="none"
    )
    for letter, ax in zip("ab", axes.flat, strict=True):
        figures.panel_label(ax, letter)
    return figure
