"""What the recursive attack refuses, before any long work."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from leaklib.chain import ConvStage, ElementwiseStage, LinearStage, ResidualStage, Stage
from leaklib.gradients.payload import SharedGradient
from leaklib.layer_system.solve import SOLVERS, Solver
from leaklib.layer_system.split import CUTOFF
from leaklib.margin_losses import MarginLoss

# A gradient of a network without ReLU has no exact zeros to speak of.
_PRUNED_SHARE = 0.01


def check_settings(solver: str, deficient: str, pruned: str, truncation: float) -> None:
    """Refuse names that are not known, and a truncation that is no share or has no effect.

    Raises:
        ValueError: listing what is known.
    """
    for what, value, known in (
        ("solver", solver, SOLVERS),
        ("deficient", deficient, ("minimum norm", "hybrid")),
        ("pruned", pruned, ("refuse", "keep")),
    ):
        if value not in known:
            raise ValueError(f"expected {what} among {', '.join(map(repr, known))}, got {value!r}")
    assert get_args(Solver) == SOLVERS
    if not 0 < truncation < 1:
        raise ValueError(
            f"expected truncation between 0 and 1, got {truncation}; it is a share of the largest "
            "singular value"
        )
    if truncation != CUTOFF and solver != "gradient first":
        raise ValueError(
            f'expected solver "gradient first" with truncation {truncation}, got {solver!r}, which '
            'truncates nothing; pass solver="gradient first" or leave truncation out'
        )


def head_of(stages: tuple[Stage, ...]) -> tuple[int, LinearStage, ElementwiseStage | None]:
    """The last fully connected layer with its index, and the activation behind it or None.

    Raises:
        ValueError: the chain does not end in a fully connected layer.
    """
    behind = stages[-1] if stages and isinstance(stages[-1], ElementwiseStage) else None
    index = len(stages) - (1 if behind is None else 2)
    last = stages[index] if index >= 0 else None
    if not isinstance(last, LinearStage):
        raise ValueError(
            "expected a chain that ends in a fully connected layer, and at most one activation "
            f"behind it, got {'nothing' if last is None else last.name!r} at its end; attack "
            "other models by matching (leaklib.attacks.dlg)"
        )
    if behind is not None and behind.inverse.name == "identity":
        behind = None
    return index, last, behind


def check_gradient(
    stages: tuple[Stage, ...], shared: SharedGradient, *, mixture: bool, pruned: str
) -> None:
    """Refuse what the recursion cannot read: several pictures, local steps, missing or dead layers.

    Raises:
        ValueError: naming layer and victim.
    """
    if shared.batch != 1 and not mixture:
        raise ValueError(
            f"expected batch 1, got {shared.batch}: of a batch the recursion returns one linear "
            "combination of its pictures through fully connected layers, and noise through "
            "convolutions, which the residuals show; to see it pass mixture=True, to part the "
            "pictures use a matching attack"
        )
    if shared.protocol is not None and shared.protocol.steps > 1:
        raise ValueError(
            f"expected one plain gradient, got the sum of {shared.protocol.steps} local steps, "
            "which no single set of weights explains; use a matching attack"
        )
    for stage in stages:
        if isinstance(stage, ResidualStage) and stage.activation.inverse.known is not None:
            raise ValueError(
                f"expected an invertible activation inside the residual block {stage.name!r}, got "
                f"{stage.activation.inverse.name}, which hides entries of what lies between its "
                "convolutions; use LeakyReLU"
            )
    zeros_are_natural = hides_values(stages)
    for name in weight_names(stages):
        if name not in shared.tensors:
            raise ValueError(
                f"expected the gradient of {name!r}, got {', '.join(shared.names)}: the recursion "
                "passes through every layer; share it, or attack what is there by matching"
            )
        tensor = shared.tensors[name].flatten(1)
        dead = (tensor == 0).all(1)
        if bool(dead.any()):
            raise ValueError(
                f"expected a gradient in layer {name!r}, got zeros only for victim "
                f"{int(dead.nonzero()[0])}: no unit was active, the loss is flat there (a hinge "
                "beyond its margin), or it was pruned away; leave this victim out"
            )
        share = _scattered_zeros(shared.tensors[name])
        if pruned == "refuse" and not zeros_are_natural and bool((share > _PRUNED_SHARE).any()):
            victim = int(share.argmax())
            raise ValueError(
                f"expected few exact zeros in the gradient of {name!r}, got "
                f"{100 * float(share[victim]):.0f} % for victim {victim}: it was pruned, and its "
                "zeros are no equations; attack by matching (leaklib.attacks.dlg), or pass "
                'pruned="keep" to take them as they are'
            )


def hides_values(stages: tuple[Stage, ...]) -> bool:
    """Whether an activation of the chain has outputs that do not tell their input, as a ReLU."""
    return any(
        isinstance(stage, ElementwiseStage) and stage.inverse.known is not None for stage in stages
    )


def _scattered_zeros(grad: Tensor) -> Tensor:
    """Share of exact zeros outside rows and columns that are all zero, one number a victim.

    A black pixel makes a column of zeros and a silent unit a row; pruning scatters them.
    """
    zero = (grad == 0).flatten(2)  # (victims, outputs, inputs and taps)
    rows, columns = zero.all(2, keepdim=True), zero.all(1, keepdim=True)
    left = ~(rows | columns)
    return (zero & left).flatten(1).sum(1) / left.flatten(1).sum(1).clamp_min(1)


def weight_names(stages: tuple[Stage, ...]) -> list[str]:
    """Names of all weights of the chain, from the image to the output."""
    names = []
    for stage in stages:
        if isinstance(stage, ConvStage | LinearStage):
            names.append(f"{stage.name}.weight")
        elif isinstance(stage, ResidualStage):
            names += [f"{part.name}.weight" for part in (stage.first, stage.second)]
            names += [] if stage.shortcut is None else [f"{stage.shortcut.name}.weight"]
    return names


def check_labels(
    labels: Tensor | None, shared: SharedGradient, outputs: int, loss: MarginLoss | None
) -> Tensor | None:
    """Labels (victims, 1) on the payload's device, in the range of the classes.

    Raises:
        ValueError: a wrong shape, dtype or class; one logit without a margin loss.
    """
    if loss is not None and outputs != 1:
        raise ValueError(
            f"expected one logit for the {loss.name} loss, got {outputs}; pass loss=None for the "
            "cross-entropy of a softmax"
        )
    if labels is None:
        return None
    if tuple(labels.shape) != (shared.victims, 1) or labels.dtype != torch.int64:
        raise ValueError(
            f"expected int64 labels (victims, 1) = ({shared.victims}, 1), got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    classes = 2 if loss is not None else outputs
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"expected labels 0 to {classes - 1}, got {labels.flatten().tolist()}")
    return labels.to(shared.device)
