"""What the last fully connected layer says of its own input, output and label, in closed form.

With z = W x + b and k = ∂L/∂z, the gradient of one input is ∂L/∂W = k xᵀ. Everything is computed in
float64 and for all victims at once. What the gradient leaves open comes as several hypotheses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leaklib.attacks.analytic import invert_linear
from leaklib.attacks.head import Head, HeadLoss, LastLayer, check_head_labels, check_homogeneous
from leaklib.attacks.softmax_norm import softmax_norms
from leaklib.chain import ElementwiseStage
from leaklib.margin_losses import MarginLoss, margin_roots

# A hypothesis is refuted where another explains the gradient this many times better; residuals
# below the floor are rounding, of float32 gradients too. A given label is only contradicted by
# more than noise.
_WORSE, _FLOOR, _CONTRADICTION = 10.0, 1e-6, 1e-2


def read_last_layer(
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    *,
    loss: HeadLoss,
    labels: Tensor | None = None,
    activation: ElementwiseStage | None = None,
) -> LastLayer:
    """Read input, output and label of the last layer from its gradient, up to what it leaves open.

    With biases k = ∂L/∂b, x = (∂L/∂W)ᵀk / kᵀk and z = W x + b: one hypothesis. Its label is the
    negative entry of k, or for one logit y = −sign k. Without biases:

        one logit   μ l'(μ) = ⟨∂L/∂W, W⟩, see `margin_roots`; z = σ⁻¹(yμ), k = y l'(μ) σ'(z)
        softmax     x = βu, u = −∂L/∂W_c / |∂L/∂W_c|, see `softmax_norms`; row c is the longest

    One logit leaves both roots and both labels open: up to four hypotheses that no gradient of this
    layer tells apart. Two softmax classes leave as much. With more classes the other rows refute
    all but one. An activation behind the layer that is linear on each side of zero, as in R-GAP's
    FCN3, scales k. A gradient that no input explains, as under noise, gets the margin or length
    that comes closest, and a residual.
    Source: Zhu & Blaschko 2021 (R-GAP), Algorithm 1 and released code, for one logit; the closed
    forms, the label and the softmax are our derivation. Cost: a few passes over the layer's
    gradient.

    Args:
        weight: W (outputs, inputs).
        bias: b (outputs,), None for a layer without.
        weight_grad: (victims, outputs, inputs), each of one input.
        bias_grad: (victims, outputs); None if and only if `bias` is.
        loss: of one logit, or "softmax" for the cross-entropy of several.
        labels: (victims,) or (victims, 1) if known; None keeps every label that is possible.
        activation: σ between the layer and the loss; None is none.

    Returns:
        LastLayer in float64.

    Raises:
        ValueError: shapes or a loss that do not fit; a gradient of zeros; a label that contradicts
            the gradient; without biases, an activation that is not linear on each side of zero.

    >>> from leaklib.margin_losses import LOGISTIC
    >>> w, x = torch.tensor([[2.0, -1.0]]), torch.tensor([1.0, 1.0])  # logit 1, label 1
    >>> grad = LOGISTIC.slope(torch.tensor(1.0)) * x
    >>> found = read_last_layer(w, None, grad[None, None], None, loss=LOGISTIC)
    >>> found.label.tolist(), [round(mu, 3) for mu in found.margin.tolist()]
    ([0, 0, 1, 1], [1.0, 1.597, 1.0, 1.597])
    >>> found.layer_input[2].float()
    tensor([1.0000, 1.0000])
    """
    head = Head(
        weight.detach().double(), None if bias is None else bias.detach().double(),
        weight_grad.double(), None if bias_grad is None else bias_grad.double(), loss, activation,
    )  # fmt: skip
    given = None if labels is None else check_head_labels(labels, head)
    if bias_grad is not None:
        found = _from_biases(head, given)
    elif isinstance(loss, MarginLoss):
        found = _from_margin(head)
    else:
        found = _from_longest_row(head, given)
    if given is not None:
        found = _keep_given(found, given)
    best = found.best_residual(head.victims)[found.victim]
    return found.select(found.residual <= (_WORSE * best).clamp_min(_FLOOR))


def _from_biases(head: Head, given: Tensor | None) -> LastLayer:
    """The label that the signs tell, and the given one where that is another."""
    k = head.bias_grad
    assert k is not None
    x = invert_linear(head.weight_grad, k)
    before = k * head.slope(head.output(head.preactivation(x))).sign()  # signs in front of the loss
    label = (before[:, 0] < 0).long() if isinstance(head.loss, MarginLoss) else before.argmin(1)
    victim = torch.arange(head.victims, device=k.device)
    if given is not None:
        other = (given != label).nonzero()[:, 0]
        victim, label = torch.cat([victim, other]), torch.cat([label, given[other]])
    # z = W x + b rather than the inverse of l': it stays exact where l' is flat
    return head.test(victim, label, x[victim], k=k[victim])


def _from_margin(head: Head) -> LastLayer:
    """Both labels and both roots of one logit without bias."""
    assert isinstance(head.loss, MarginLoss)
    check_homogeneous(head)
    tau = -(head.weight_grad * head.weight).flatten(1).sum(1)
    # noise may lift τ above its maximum: the double root is the margin that comes closest
    roots = margin_roots(head.loss, tau, tolerance=torch.inf)
    victim, which = roots.isfinite().nonzero(as_tuple=True)
    label = torch.tensor([0, 1], device=victim.device).repeat_interleave(len(victim))
    margin, victim = roots[victim, which].repeat(2), victim.repeat(2)
    z = head.undo(((2 * label - 1) * margin)[:, None])
    k = head.output_grad(z, label)
    # k = 0 for a negative output behind a ReLU: x is then infinite, and refuted
    return head.test(victim, label, head.weight_grad[victim, 0] / k, z=z, k=k)


def _from_longest_row(head: Head, given: Tensor | None) -> LastLayer:
    """Softmax without biases: every length of x that the label's row allows."""
    check_homogeneous(head)
    lengths = head.weight_grad.norm(dim=2)
    classes = lengths.shape[1]
    candidates = torch.ones_like(lengths, dtype=torch.bool)
    if classes > 2 and head.activation is None:
        # |p_c − 1| is the sum of all other entries
        candidates = torch.zeros_like(candidates)
        candidates.scatter_(1, lengths.argmax(1, keepdim=True), True)
        if given is not None:
            candidates.scatter_(1, given[:, None], True)
    victim, label = (candidates & (lengths > 0)).nonzero(as_tuple=True)
    direction = -head.weight_grad[victim, label] / lengths[victim, label, None]
    # σ is linear on each side of zero: σ(βv) = β σ(v), and its slope does not depend on β
    unit = head.output(head.preactivation(direction))
    others = torch.arange(classes, device=label.device) != label[:, None]
    # (1 − p_c) |x| is summed from the other rows: 1 − p_c itself was rounded where p_c is near 1
    along = torch.einsum("roi,ri->ro", head.weight_grad[victim], direction) / head.slope(unit)
    length = (along * others).sum(1)
    exists = length > 0
    victim, label, direction = victim[exists], label[exists], direction[exists]
    unit, others, length = unit[exists], others[exists], length[exists]
    differences = unit[others].view(-1, classes - 1) - unit.gather(1, label[:, None])
    rows, norms = softmax_norms(differences, length)
    return head.test(victim[rows], label[rows], norms[:, None] * direction[rows])


def _keep_given(found: LastLayer, given: Tensor) -> LastLayer:
    """Keep the given labels, or say which one the gradient contradicts."""
    kept = found.select(found.label == given[found.victim])
    ours, best = (rows.best_residual(len(given)) for rows in (kept, found))
    wrong = (ours > (_WORSE * best).clamp_min(_CONTRADICTION)).nonzero()[:, 0]
    if len(wrong):
        victim = int(wrong[0])
        raise ValueError(
            f"expected labels that fit the gradient, got label {int(given[victim])} for victim "
            f"{victim}: its residual in the last layer is {float(ours[victim]):.2g}, that of "
            f"another label {float(best[victim]):.2g}; pass labels=None to have labels found"
        )
    return kept
