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

from leaklib.attacks.hybrid.correction import check_child, correct_layer
from leaklib.attacks.hybrid.prior import smooth_null_space
from leaklib.attacks.hybrid.settings import PUBLISHED, Correction, correction_of
from leaklib.attacks.recursive.checks import head_of
from leaklib.attacks.recursive.conclusion import conclude
from leaklib.attacks.recursive.descent import descend
from leaklib.attacks.recursive.opening import open_recursion
from leaklib.attacks.recursive.report import RecursiveReconstruction
from leaklib.attacks.recursive.rows import Rows
from leaklib.attacks.recursive.steps import StepSettings
from leaklib.chain import ConvStage, ElementwiseStage, PoolStage, ResidualStage, Stage, read_chain
from leaklib.gradients.payload import SharedGradient
from leaklib.layer_system.solve import residual_of
from leaklib.layer_system.split import CUTOFF
from leaklib.precision import full_float32

# How far a corrected map is kept from the edge of its activation's range: beyond it the inverse is
# rounding. The published code clips tanh before every inverse, here only corrected maps are
# clipped.
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

    The published method works on pixels shifted to [-0.5, 0.5]. The minimum norm, and with it the
    linear answer, depends on the origin: build the model with normalisation mean 0.5 and std 1.

    Args:
        model: a chain of named layers (`nn.Sequential`), see `leaklib.chain.read_chain`.
        shared: the released gradients of single pictures, all weights of the chain.
        image_shape: (channels, height, width).
        labels: (victims, 1) if known, as in the paper; None reads them off the last layer.
        corrections: for the convolutions from the image on; the last one repeats.
        lr: learning rate of Adam.
        skip_exact: leave a layer's input alone where the layer has full rank and the victim's
            equations are solved.
        pull_back: where a layer is deficient, demand that its input be in the range of the layer
            before it, by the virtual constraints of `rgap`. The workshop version's abstract names
            such a constraint; its form is our reading.
        image_prior: "null space" replaces the correction of a deficient image layer, see
            `smooth_null_space`.
        keep_inputs: keep the input found for every layer.
        progress: show bars.

    Returns:
        RecursiveReconstruction; pixels are not boxed. Residuals are those of the corrected inputs.
        `evaluations` counts steps of all corrections. Cost: per victim the sum of the steps, each
        about 7/3 gradient evaluations of the layers behind.

    Raises:
        ValueError: as `rgap`; before any work also a model that is no `nn.Sequential` of its own
            layers, one logit, a ReLU, or pooling at the image layer under the image prior.

    Source: Chen & Campbell (arXiv 2210.13231) and released code.
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"expected an nn.Sequential of named layers, got {type(model).__name__}; build one "
            "from its layers, or attack by matching (leaklib.attacks.dlg)"
        )
    if image_prior not in ("none", "null space"):
        raise ValueError(f"expected image_prior 'none' or 'null space', got {image_prior!r}")
    plan = tuple(corrections)
    correction_of(plan, 0)
    _check_chain(model, read_chain(model, image_shape), plan, image_prior)
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
        if image_prior == "null space" and place == 0 and short:
            return _corrected(rows, smooth_null_space(stages[:index], rows))
        chosen = correction_of(plan, place)
        exact = (solved.residual < _EXACT) & (skip_exact and not short)
        left = (~exact).nonzero()[:, 0]
        if not chosen.steps or not len(left):
            return rows
        part = rows.select(left)
        found = correct_layer(model, shared, stage, part, chosen, lr=lr, progress=progress)
        spent[part.victim] += chosen.steps
        value = rows.value.clone()
        value[left] = _inside_range(stages[:index], found)
        return _corrected(rows, value)

    settings = StepSettings(
        "auto", "hybrid" if pull_back else "minimum norm", CUTOFF, opening.tolerance,
        rounding=False, keep_inputs=keep_inputs, keep_system=True,
    )  # fmt: skip
    rows = descend(opening, settings, progress=progress, correct=correct)
    return replace(conclude(opening, rows, shared), evaluations=spent)


def _check_chain(
    model: nn.Sequential, stages: tuple[Stage, ...], plan: tuple[Correction, ...], image_prior: str
) -> None:
    """Refuse what the corrections cannot work on, before any work."""
    if head_of(stages)[1].output_shape[0] == 1:
        raise ValueError(
            "expected at least two logits, got one: the corrections match the gradient of a "
            "cross-entropy; use rgap (leaklib.attacks.rgap)"
        )
    for stage in stages:
        if isinstance(stage, ElementwiseStage) and stage.inverse.known is not None:
            raise ValueError(
                f"expected invertible activations, got {stage.inverse.name} in layer "
                f"{stage.name!r}, which hides entries of its input; use LeakyReLU, or rgap"
            )
    places = [i for i, stage in enumerate(stages) if isinstance(stage, ConvStage)]
    for place, index in enumerate(places):
        if correction_of(plan, place).steps:
            check_child(model, stages[index].name)
    if image_prior == "null space" and places:
        first = places[0]
        for stage in stages[: first + 2]:
            if isinstance(stage, PoolStage | ResidualStage):
                raise ValueError(
                    f"expected image_prior 'none' with layer {stage.name!r} next to the image's "
                    f"convolution {stages[first].name!r}, got 'null space', which knows the rows "
                    "of that convolution alone; pass image_prior='none'"
                )


def _corrected(rows: Rows, value: Tensor) -> Rows:
    """Rows with a changed input of the layer just solved, and the residual that it has."""
    assert rows.system is not None
    assert rows.target is not None
    *before, newest = rows.solved
    residual = residual_of(rows.system, rows.target, value)
    solved = (*before, replace(newest, residual=residual))
    worst = torch.stack([layer.residual for layer in solved]).amax(0)
    return replace(rows, value=value, solved=solved, worst=worst)


def _inside_range(before: tuple[Stage, ...], value: Tensor) -> Tensor:
    """Keep a corrected map inside the range of the activation that made it."""
    if not before or not isinstance(before[-1], ElementwiseStage):
        return value
    low, high = before[-1].inverse.range
    return value.clamp(low + RANGE_MARGIN, high - RANGE_MARGIN)
