"""The last fully connected layer as an attacker sees it, and hypotheses about what went through."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from leaklib.chain import ElementwiseStage
from leaklib.margin_losses import MarginLoss

HeadLoss = MarginLoss | Literal["softmax"]


@dataclass(frozen=True)
class LastLayer:
    """Hypotheses about the last layer, one a row; sorted by victim.

    Args:
        victim: whose (rows,).
        label: its label (rows,).
        margin: μ = y·output of one logit (rows,); NaN with more outputs.
        preactivation: z (rows, outputs).
        preactivation_grad: k = ∂L/∂z (rows, outputs).
        layer_input: x (rows, inputs).
        residual: ‖g − g(x, label)‖/‖g‖ (rows,), with g the layer's shared gradient.
    """

    victim: Tensor
    label: Tensor
    margin: Tensor
    preactivation: Tensor
    preactivation_grad: Tensor
    layer_input: Tensor
    residual: Tensor

    def select(self, rows: Tensor) -> LastLayer:
        """Some of the rows, by a mask or by their indices."""
        return LastLayer(*(getattr(self, field.name)[rows] for field in fields(self)))

    def best_residual(self, victims: int) -> Tensor:
        """Smallest residual of each victim (victims,); infinite where it has no row."""
        best = self.residual.new_full((victims,), torch.inf)
        return best.scatter_reduce(0, self.victim, self.residual, "amin")


@dataclass(frozen=True)
class Head:
    """Layer, shared gradient and loss: all that a hypothesis is tested with.

    Args:
        weight: W (outputs, inputs), float64.
        bias: b (outputs,) or None.
        weight_grad: (victims, outputs, inputs), float64.
        bias_grad: (victims, outputs), None if and only if `bias` is.
        loss: of one logit, or "softmax" for the cross-entropy of several.
        activation: σ between the layer and the loss; None is none.
    """

    weight: Tensor
    bias: Tensor | None
    weight_grad: Tensor
    bias_grad: Tensor | None
    loss: HeadLoss
    activation: ElementwiseStage | None

    def __post_init__(self) -> None:
        _check_loss(self)
        _check_gradient(self)

    @property
    def victims(self) -> int:
        """Number of victims."""
        return len(self.weight_grad)

    def preactivation(self, x: Tensor) -> Tensor:
        """Give z = W x + b (rows, outputs)."""
        return F.linear(x, self.weight, self.bias)

    def output(self, z: Tensor) -> Tensor:
        """σ(z)."""
        return z if self.activation is None else self.activation.inverse.forward(z)

    def undo(self, output: Tensor) -> Tensor:
        """Give z from σ(z)."""
        return output if self.activation is None else self.activation.inverse.preactivation(output)

    def slope(self, output: Tensor) -> Tensor:
        """σ'(z) from σ(z)."""
        if self.activation is None:
            return torch.ones_like(output)
        return self.activation.inverse.slope(output)

    def output_grad(self, z: Tensor, label: Tensor) -> Tensor:
        """Give k = ∂L/∂z (rows, outputs) for the labels (rows,)."""
        output = self.output(z)
        if isinstance(self.loss, MarginLoss):
            y = (2 * label - 1)[:, None]
            return self.slope(output) * y * self.loss.slope(y * output)
        return self.slope(output) * (output.softmax(1) - F.one_hot(label, z.shape[1]))

    def test(
        self,
        victim: Tensor,
        label: Tensor,
        x: Tensor,
        *,
        z: Tensor | None = None,
        k: Tensor | None = None,
    ) -> LastLayer:
        """Hypotheses with their residuals; z and k where they are known better than from x."""
        forward = self.preactivation(x)
        implied = self.output_grad(forward, label)
        grad = self.weight_grad[victim]
        misfit = (implied[:, :, None] * x[:, None] - grad).flatten(1).square().sum(1)
        size = grad.flatten(1).square().sum(1)
        if self.bias_grad is not None:
            misfit = misfit + (implied - self.bias_grad[victim]).square().sum(1)
            size = size + self.bias_grad[victim].square().sum(1)
        z = forward if z is None else z
        margin = torch.full_like(size, torch.nan)
        if isinstance(self.loss, MarginLoss):
            margin = (2 * label - 1) * self.output(z)[:, 0]
        k = implied if k is None else k
        # an infinite input explains nothing
        residual = (misfit / size).sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf)
        rows = LastLayer(victim, label, margin, z, k, x, residual)
        return rows.select(victim.argsort(stable=True))


def check_homogeneous(head: Head) -> None:
    """Refuse an activation unless σ(tz) = t σ(z) for t > 0.

    Raises:
        ValueError: naming the activation; then the margin has no closed form.
    """
    one = torch.ones(2, len(head.weight), dtype=torch.float64, device=head.weight.device)
    one[1] = -1
    if head.activation is not None and not torch.allclose(
        head.output(2 * one), 2 * head.output(one), rtol=1e-9, atol=0
    ):
        raise ValueError(
            "expected an activation behind the last layer that is linear on each side of zero, "
            f"such as LeakyReLU, since the layer has no bias, got {head.activation.inverse.name}; "
            "use a bias, no such activation, or a matching attack"
        )


def check_head_labels(labels: Tensor, head: Head) -> Tensor:
    """Known labels as (victims,), on the gradient's device.

    Raises:
        ValueError: a wrong shape or dtype, or a label that does not exist.
    """
    classes = max(2, len(head.weight))
    if tuple(labels.shape) not in ((head.victims,), (head.victims, 1)):
        raise ValueError(
            f"expected labels ({head.victims},) or ({head.victims}, 1), got {tuple(labels.shape)}"
        )
    wrong = (labels < 0) | (labels >= classes)
    if labels.is_floating_point() or bool(wrong.any()):
        raise ValueError(
            f"expected integer labels 0 to {classes - 1}, got {labels.flatten().tolist()}"
        )
    return labels.flatten().long().to(head.weight_grad.device)


def _check_loss(head: Head) -> None:
    if not isinstance(head.loss, MarginLoss) and head.loss != "softmax":
        raise ValueError(f'expected a MarginLoss or "softmax" as the loss, got {head.loss!r}')
    outputs = len(head.weight)
    if isinstance(head.loss, MarginLoss) != (outputs == 1):
        name = head.loss.name if isinstance(head.loss, MarginLoss) else head.loss
        raise ValueError(
            f"expected a loss of {outputs} output(s), got {name!r}; pass a MarginLoss for one "
            'logit, "softmax" for several'
        )


def _check_gradient(head: Head) -> None:
    expected = (head.victims, *head.weight.shape)
    if head.weight_grad.shape != expected:
        raise ValueError(
            f"expected a weight gradient (victims, outputs, inputs) = {expected}, got "
            f"{tuple(head.weight_grad.shape)}"
        )
    if (head.bias is None) != (head.bias_grad is None):
        raise ValueError(
            "expected the gradient of the last layer's bias if and only if it has one, got "
            f"{'no' if head.bias is None else 'a'} bias and "
            f"{'no' if head.bias_grad is None else 'a'} gradient; share both or neither"
        )
    if head.bias_grad is not None and head.bias_grad.shape != expected[:2]:
        raise ValueError(
            f"expected a bias gradient (victims, outputs) = {expected[:2]}, got "
            f"{tuple(head.bias_grad.shape)}"
        )
    driving = head.weight_grad.flatten(1) if head.bias_grad is None else head.bias_grad
    if not bool(head.weight_grad.isfinite().all()) or not bool(driving.isfinite().all()):
        raise ValueError("expected a finite gradient of the last layer, got NaN or infinity")
    zero = (driving == 0).all(1)
    if bool(zero.any()):
        raise ValueError(
            "expected a gradient of the last layer, got zeros only for victim "
            f"{int(zero.nonzero()[0])}: its margin is 1 or more under the hinge loss, its loss "
            "rounds to zero, or a layer is dead; leave this victim out"
        )
