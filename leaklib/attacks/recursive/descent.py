"""The walk from the last layer to the image, and the hypotheses that fall by the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from leaklib.attacks.recursive.opening import Opening
from leaklib.attacks.recursive.rows import Rows
from leaklib.attacks.recursive.steps import StepSettings, step

# (index of the stage just undone, rows in front of it) -> rows with corrected values
Correct = Callable[[int, Rows], Rows]

# A hypothesis is dropped when its worst residual exceeds the best one's by this factor.
_WORSE = 10.0


def descend(
    opening: Opening,
    settings: StepSettings,
    *,
    progress: bool = False,
    correct: Correct | None = None,
) -> Rows:
    """Walk from the last layer's input to the image, dropping hypotheses on the way.

    Args:
        opening: where to start.
        settings: how layers are solved.
        progress: show a bar over the layers.
        correct: changes the input found for a layer before the next one is undone.

    Returns:
        Rows whose value is the image.

    Raises:
        ValueError: a given label that contradicts its gradient.
    """
    stages, labels = opening.stages, opening.labels
    rows = opening.rows()
    rows = rows.keep_input() if settings.keep_inputs else rows
    first = True
    backwards = range(len(stages) - 2, -1, -1)
    for index in tqdm(backwards, desc="recursion", unit="layer", disable=not progress):
        before = len(rows.solved)
        rows = step(stages, index, rows, opening.grads, settings)
        if len(rows.solved) == before:
            continue
        if labels is not None and first:
            rows = _keep_given(rows, labels, stages[index].name)
        rows, first = _drop_worse(rows), False
        rows = rows if correct is None else correct(index, rows)
        rows = rows.keep_input() if settings.keep_inputs else rows
    if labels is not None and first:  # a network of one layer
        rows = _keep_given(rows, labels, opening.last.name)
    return rows


def _keep_given(rows: Rows, labels: Tensor, layer: str) -> Rows:
    """Keep the given labels, or say that the gradient speaks against one."""
    given = rows.label == labels[rows.victim, 0]
    for victim in rows.victim.unique().tolist():
        mine = rows.victim == victim
        with_given = rows.worst[mine & given].amin() if bool((mine & given).any()) else torch.inf
        other = mine & ~given
        against = rows.worst[other].amin() if bool(other.any()) else torch.inf
        if with_given > 1e-2 and with_given > _WORSE * against:
            raise ValueError(
                f"expected labels that fit the gradient, got label {int(labels[victim, 0])} for "
                f"victim {victim}: layer {layer!r} then has the residual {float(with_given):.2g}, "
                f"against {float(against):.2g} with the other label; pass labels=None to have "
                "labels found"
            )
    return rows.select(given)


def _drop_worse(rows: Rows) -> Rows:
    """Drop hypotheses whose equations contradict each other far more than another's do."""
    best = rows.worst.new_full((int(rows.victim.max()) + 1,), torch.inf)
    best = best.scatter_reduce(0, rows.victim, rows.worst.nan_to_num(nan=torch.inf), "amin")
    keep = rows.worst <= (_WORSE * best[rows.victim]).clamp_min(1e-9)
    # where everything is NaN or equally bad, all stay
    kept = torch.zeros_like(best).scatter_add(0, rows.victim, keep.to(best.dtype))
    return rows.select(keep | (kept[rows.victim] == 0))
