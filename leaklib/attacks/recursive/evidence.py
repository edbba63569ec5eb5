"""How strongly the layers speak against a label that the last layer leaves open."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leaklib.attacks.recursive.opening import open_recursion
from leaklib.attacks.recursive.steps import StepSettings, step
from leaklib.gradients.payload import SharedGradient
from leaklib.layer_system.split import CUTOFF
from leaklib.margin_losses import MarginLoss
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
    opening = open_recursion(model, shared, image_shape=image_shape, loss=loss)
    settings = StepSettings("auto", "minimum norm", CUTOFF, opening.tolerance, rounding=False)
    rows = opening.rows()
    for index in range(len(opening.stages) - 2, -1, -1):
        rows = step(opening.stages, index, rows, opening.grads, settings)
        if len(rows.solved) > 1:
            break
    residual, outputs = rows.solved[-1].residual, opening.last.output_shape[0]
    labels = max(2, outputs)
    best = residual.new_full((shared.victims * labels,), torch.inf)
    best = best.scatter_reduce(0, rows.victim * labels + rows.label, residual, "amin")
    return best.view(shared.victims, labels)
