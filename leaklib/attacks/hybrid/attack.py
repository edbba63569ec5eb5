"""The layer-wise hybrid attack: a linear system for every layer, corrected by gradient matching.

    x_i = argmin ‖U_i x − v_i‖,   then, from there,   min_x J_i(x)   (see `Correction`),

from the last layer to the image. The systems are those of the recursive attack; what is added is
the correction. Source: Chen & Campbell (arXiv 2210.13231) and released code, where the method is
called Hybrid; its workshop version (arXiv 2111.10178) calls it COPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from leaklib.attacks.hybrid.correction import correct_layer
from leaklib.attacks.hybrid.prior import smooth_null_space
from leaklib.attacks.hybrid.settings import PUBLISHED, Correction, correction_of
from leaklib.attacks.recursive.conclusion import conclude
from leaklib.attacks.recursive.descent import descend
from leaklib.attacks.recursive.opening import open_recursion
from leaklib.attacks.recursive.report import RecursiveReconstruction
from leaklib.attacks.recursive.rows import Rows
from leaklib.attacks.recursive.steps import StepSettings
from leaklib.chain import ConvStage, ElementwiseStage, Stage
from leaklib.gradients.payload import SharedGradient
from leaklib.layer_system.split import CUTOFF
from leaklib.precision import full_float32

# How far a corrected map is kept from the edge of its activation's range, as the published code
# does for tanh: beyond it the inverse is rounding.
RANGE_MARGIN = 1e-4
# Residual below which a layer's equations count as solved, float32 gradients too.
_EXACT = 1e-4


@full_float32()
def hybrid(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, int, int],
    labels: Tensor | None = None,
    corrections: Sequence[Correction] = PUBLISHED,
    lr: float = 1e-3,
    skip_exact: bool = False,
    pull_back: bool = False,
    image_prior: Literal["none", "null space"] = "none",
    keep_inputs: bool = False,
    progress: bool = False,
) -> RecursiveReconstruction:
    """Recover private pictures layer by layer, each layer's linear answer corrected by matching.

    The defaults are the published method. Our options: `skip_exact` keeps what a full-rank layer
    gave, which the total variation would blur; `image_prior` fills what the image's own layer
    leaves open with the smoothest picture in range.

    Args:
        model: a chain of named layers (`nn.Sequential`), see `leaklib.chain.read_chain`.
        shared: the released gradients of single pictures, all weights of the chain.
        image_shape: (channels, height, width).
        labels: (victims, 1) if known, as in the paper; None reads them off the last layer.
        corrections: for the convolutions from the image on; the last one repeats.
        lr: learning rate of Adam.
        skip_exact: leave layers alone that have full rank and solved their equations.
        pull_back: where a layer is deficient, demand that its input be in the range of the layer
            before it, by the virtual constraints of `rgap`. The workshop version's abstract names
            such a constraint; its form is our reading.
        image_prior: "null space" replaces the correction of a deficient image layer, see
            `smooth_null_space`.
        keep_inputs: keep the input found for every layer.
        progress: show bars.

    Returns:
        RecursiveReconstruction; pixels are not boxed. `evaluations` counts steps of all
        corrections. Cost: per victim the sum of the steps, each about 7/3 gradient evaluations of
        the layers behind.

    Raises:
        ValueError: as `rgap`.
        TypeError: a model that is no `nn.Sequential`.

    Source: Chen & Campbell (arXiv 2210.13231), sections 3 and 4, and released code.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"expected an nn.Sequential of named layers, got {type(model).__name__}")
    if image_prior not in ("none", "null space"):
        raise ValueError(f"expected image_prior 'none' or 'null space', got {image_prior!r}")
    plan = tuple(corrections)
    correction_of(plan, 0)
    opening = open_recursion(model, shared, image_shape=image_shape, labels=labels)
    stages = opening.stages
    places = [i for i, stage in enumerate(stages) if isinstance(stage, ConvStage)]
    spent = torch.zeros(shared.victims, dtype=torch.int64, device=shared.device)

    def correct(index: int, rows: Rows) -> Rows:
        stage, solved = stages[index], rows.solved[-1]
        if not isinstance(stage, ConvStage) or rows.system is None:
            return rows
        place = places.index(index)
        short = solved.rank is not None and solved.rank < solved.unknowns
        if skip_exact and not short and float(solved.residual.amax()) < _EXACT:
            return rows
        if image_prior == "null space" and place == 0 and short:
            return replace(rows, value=smooth_null_space(stages[:index], rows))
        chosen = correction_of(plan, place)
        if not chosen.steps:
            return rows
        value = correct_layer(
            model, shared, stage, rows, chosen, lr=lr, progress=progress
        )  # fmt: skip
        spent[rows.victim] += chosen.steps
        return replace(rows, value=_inside_range(stages[:index], value))

    settings = StepSettings(
        "auto", "hybrid" if pull_back else "minimum norm", CUTOFF, opening.tolerance,
        rounding=False, keep_inputs=keep_inputs, keep_system=True,
    )  # fmt: skip
    rows = descend(opening, settings, progress=progress, correct=correct)
    return replace(conclude(opening, rows, shared), evaluations=spent)


def _inside_range(before: tuple[Stage, ...], value: Tensor) -> Tensor:
    """Keep a corrected map inside the range of the activation that made it."""
    if not before or not isinstance(before[-1], ElementwiseStage):
        return value
    low, high = before[-1].inverse.range
    return value.clamp(low + RANGE_MARGIN, high - RANGE_MARGIN)
