"""How strongly the layers speak against a label that the last layer leaves open."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leaklib.attacks.last_layer import read_last_layer
from leaklib.attacks.recursive.checks import check_gradient, head_of
from leaklib.attacks.recursive.rows import Rows
from leaklib.attacks.recursive.steps import StepSettings, step
from leaklib.chain import read_chain
from leaklib.gradients.payload import SharedGradient, check_payload
from leaklib.layer_system.split import CUTOFF
from leaklib.margin_losses import LOGISTIC, MarginLoss
from leaklib.precision import full_float32


@full_float32()
def label_residuals(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, int, int],
    loss: MarginLoss | None = None,
) -> Tensor:
    """Residual ‖U x − b‖/‖b‖ of the layer before the last, under each label.

    The last layer without bias fits either label of one logit exactly. A wrong one turns the sign
    of its input, and the layer before it then contradicts itself. `rgap` drops labels by this
    number; here it is for all of them. Each label gets its better root.

    Args:
        model: a chain, as for `rgap`.
        shared: the released gradients of single pictures.
        image_shape: (channels, height, width).
        loss: of a model with one logit; None is logistic there, and cross-entropy of the softmax
            for more logits.

    Returns:
        (victims, labels), float64; infinite for a label that the last layer itself excludes. A
        network of one layer has no layer before, and gives the last layer's own residual. Cost:
        one layer of `rgap`.

    Raises:
        ValueError: as `rgap`.
    """
    stages = read_chain(model, image_shape)
    check_payload(model, shared)
    head, last, behind = head_of(stages)
    check_gradient(stages, shared, mixture=False, pruned="refuse")
    grads = {name: tensor.double() for name, tensor in shared.items()}
    outputs = last.output_shape[0]
    found = read_last_layer(
        last.weight, last.bias, grads[f"{last.name}.weight"], grads.get(f"{last.name}.bias"),
        loss=loss or (LOGISTIC if outputs == 1 else "softmax"), activation=behind,
    )  # fmt: skip
    rows = Rows(
        victim=found.victim, label=found.label, margin=found.margin, value=found.layer_input,
        grad=found.preactivation_grad @ last.weight, worst=found.residual, solved=(),
    )  # fmt: skip
    settings = StepSettings(
        "auto", "minimum norm", CUTOFF,
        tolerance=1e-13 if shared.dtype == torch.float64 else 1e-10, rounding=False,
    )  # fmt: skip
    for index in range(head - 1, -1, -1):
        rows = step(stages, index, rows, grads, settings)
        if rows.solved:
            break
    residual = rows.solved[0].residual if rows.solved else rows.worst
    labels = max(2, outputs)
    best = residual.new_full((shared.victims * labels,), torch.inf)
    best = best.scatter_reduce(0, rows.victim * labels + rows.label, residual, "amin")
    return best.view(shared.victims, labels)
