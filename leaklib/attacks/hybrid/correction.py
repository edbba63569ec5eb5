"""One layer's correction: gradient matching behind it, its own equations as a penalty."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaklib.attacks import adam
from leaklib.attacks.driver import RunSettings, drive
from leaklib.attacks.hybrid.settings import Correction
from leaklib.attacks.matching_settings import Matching
from leaklib.attacks.problem import Problem, matching_problem
from leaklib.attacks.recursive.rows import Rows
from leaklib.chain import ConvStage
from leaklib.gradients.payload import SharedGradient


def correct_layer(
    model: nn.Sequential,
    shared: SharedGradient,
    stage: ConvStage,
    rows: Rows,
    correction: Correction,
    *,
    lr: float,
    progress: bool,
) -> Tensor:
    """Minimise J_i from the linear answer; the best iterate is kept.

    Args:
        model: the whole network.
        shared: the released gradients.
        stage: the convolution whose input is corrected.
        rows: the recursion in front of it, with the layer's system.
        correction: weights and budget.
        lr: learning rate of Adam.
        progress: show a bar.

    Returns:
        Inputs (rows, channels, height, width), float64.

    Raises:
        ValueError: the layer is not one of the model's own children.
    """
    problem = layer_problem(model, shared, stage, rows, correction)
    settings = adam.AdamSettings(
        lr=lr, signed=False, steps=correction.steps, milestones=(), box=None
    )
    start = adam.start(rows.value.flatten(1).to(shared.dtype), settings)
    state, _ = drive(
        start, lambda s: adam.tick(s, problem.evaluate, settings),
        max_evaluations=correction.steps, settings=RunSettings(progress=progress),
        identity={"attack": "hybrid", "layer": stage.name}, label=f"correcting {stage.name}",
    )  # fmt: skip
    return state.best_x.double().view_as(rows.value)


def layer_problem(
    model: nn.Sequential,
    shared: SharedGradient,
    stage: ConvStage,
    rows: Rows,
    correction: Correction,
) -> Problem:
    """J_i and its slope as a batched objective over the layer's input; see `correct_layer`."""
    behind = _from_layer(model, stage.name)
    names = [name for name, _ in behind.named_parameters()]
    dtype = shared.dtype
    target = shared.replace({n: shared.tensors[n][rows.victim] for n in names})
    assert rows.system is not None
    assert rows.target is not None
    # The published penalty takes the rows as they are. The gradient's own precision is enough for
    # it: the cosine beside it sees no more.
    system = replace(
        rows.system,
        weight=rows.system.weight.to(dtype),
        preactivation_grad=rows.system.preactivation_grad.to(dtype),
        scale=torch.ones_like(rows.system.scale, dtype=dtype),
    )
    grad = rows.target[1] / rows.system.scale.view(-1, 1, 1, 1, 1)
    right = (rows.target[0].to(dtype), grad.to(dtype))
    everyone = torch.arange(len(rows.value), device=shared.device)

    def penalty(images: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        part, goal = system, right
        if not torch.equal(chosen, everyone):  # selecting copies the rows
            part, goal = system.select(chosen), (right[0][chosen], right[1][chosen])
        wrong = tuple(a - b for a, b in zip(part.rows(images[:, 0]), goal, strict=True))
        value = torch.stack([w.flatten(1).square().sum(1) for w in wrong]).sum(0)
        slope, weight = part.adjoint(wrong), correction.system
        return weight * value, (2 * weight * slope)[:, None]

    return matching_problem(
        behind, target, image_shape=stage.input_shape, labels=rows.label[:, None], classes=0,
        matching=Matching(
            "layer_cosine", layer_weights=dict.fromkeys(names, correction.cosine),
            tv_weight=correction.tv,
        ),
        restarts=1, loss=F.cross_entropy, penalty=penalty if correction.system else None,
    )  # fmt: skip


def _from_layer(model: nn.Sequential, name: str) -> nn.Sequential:
    """The layers from `name` on, under their own names."""
    check_child(model, name)
    # named_children() leaves out a module's second place
    children = [(child, part) for child, part in model._modules.items() if part is not None]
    start = [child for child, _ in children].index(name)
    return nn.Sequential(OrderedDict(children[start:])).eval()


def check_child(model: nn.Sequential, name: str) -> None:
    """Refuse a layer that is not one of the model's own children.

    Raises:
        ValueError: naming it and the children.
    """
    if name not in model._modules:
        raise ValueError(
            f"expected layer {name!r} among the model's children {list(model._modules)}; "
            "flatten nested sequences into one nn.Sequential"
        )
