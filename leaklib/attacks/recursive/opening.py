"""How a recursion opens: the chain is read, the payload checked, the last layer undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leaklib.attacks.last_layer import LastLayer, read_last_layer
from leaklib.attacks.recursive.checks import check_gradient, check_labels, head_of, hides_values
from leaklib.attacks.recursive.rows import Rows, Solved
from leaklib.chain import LinearStage, Stage, read_chain
from leaklib.gradients.payload import SharedGradient, check_payload
from leaklib.margin_losses import LOGISTIC, MarginLoss


@dataclass(frozen=True)
class Opening:
    """Where a recursion starts.

    Args:
        stages: the chain from the image to the last fully connected layer.
        last: that layer.
        hypotheses: what it says.
        grads: all gradients by parameter name (victims, *shape), float64.
        labels: given labels (victims, 1), None to have them found.
        tolerance: of linear systems, fit for the dtype of the gradient.
    """

    stages: tuple[Stage, ...]
    last: LinearStage
    hypotheses: LastLayer
    grads: Mapping[str, Tensor]
    labels: Tensor | None
    tolerance: float

    def rows(self) -> Rows:
        """The recursion in front of the last layer: one row a hypothesis."""
        found, inputs = self.hypotheses, self.last.input_shape[0]
        # an outer product, always of full rank
        head = Solved(
            self.last.name, found.residual, torch.ones_like(found.residual), inputs, inputs
        )
        return Rows(
            victim=found.victim, label=found.label, margin=found.margin, value=found.layer_input,
            grad=found.preactivation_grad @ self.last.weight, worst=found.residual, solved=(head,),
        )  # fmt: skip


def open_recursion(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, int, int],
    loss: MarginLoss | None = None,
    labels: Tensor | None = None,
    mixture: bool = False,
    pruned: str = "refuse",
    ignore_last_activation: bool = False,
) -> Opening:
    """Check everything and undo the last layer; arguments as in `rgap`.

    Raises:
        ValueError: a layer that cannot be undone, a payload that does not fit, labels out of range
            or against the gradient; a loss that is no MarginLoss; a last layer that no hypothesis
            explains.
    """
    if loss is not None and not isinstance(loss, MarginLoss):
        raise ValueError(
            "expected a MarginLoss for one logit (see leaklib.margin_losses) or None, got "
            f"{type(loss).__name__}; None is the cross-entropy where there are several logits"
        )
    stages = read_chain(model, image_shape)
    check_payload(model, shared)
    head, last, behind = head_of(stages)
    check_gradient(stages, shared, mixture=mixture, pruned=pruned)
    if ignore_last_activation and hides_values(stages):
        raise ValueError(
            'expected invertible activations for solver="published", got a ReLU: its zeros do not '
            'survive the float32 rounding between layers; use solver="auto"'
        )
    outputs = last.output_shape[0]
    margin_loss = loss or (LOGISTIC if outputs == 1 else None)
    labels = check_labels(labels, shared, outputs, margin_loss)
    grads = {name: tensor.double() for name, tensor in shared.items()}
    bias_grad = grads.get(f"{last.name}.bias")
    # One logit or two without bias: both labels stay in the race, so that a wrong one is noticed.
    undecided = outputs <= 2 and bias_grad is None
    hypotheses = read_last_layer(
        last.weight, last.bias, grads[f"{last.name}.weight"], bias_grad,
        loss=margin_loss or "softmax", labels=None if undecided else labels,
        activation=None if ignore_last_activation else behind,
    )  # fmt: skip
    left = torch.ones(shared.victims, dtype=torch.bool, device=hypotheses.victim.device)
    left[hypotheses.victim] = False
    if bool(left.any()):
        raise ValueError(
            f"expected a last layer {last.name!r} that some label explains, got none for victim "
            f"{int(left.nonzero()[0])}: noise left no consistent last layer; leave this victim "
            "out, or attack by matching (leaklib.attacks.dlg)"
        )
    tolerance = 1e-13 if shared.dtype == torch.float64 else 1e-10
    return Opening(stages[: head + 1], last, hypotheses, grads, labels, tolerance)
