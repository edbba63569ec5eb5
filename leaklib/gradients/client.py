"""What a client computes: the gradient, or the model update, of its private batch.

One function serves the client and the attacker's dummy images alike, so both sides agree on the
loss, its reduction and the protocol by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from leaklib.data import PrivateInputs, Victims
from leaklib.gradients.payload import (
    FedAvg,
    Reduction,
    SharedGradient,
    check_finite,
    match_parameters,
)
from leaklib.gradients.stateless import batchnorm_statistics, without_side_effects
from leaklib.gradients.stochastic import (
    Noise,
    add_losses,
    check_noise,
    collected_losses,
    draw_noise,
    one_step,
)
from leaklib.margin_losses import MarginLoss
from leaklib.precision import full_float32

Loss = Callable[..., Tensor]

# One vmap over victims wins where many small kernels dominate; a large network fills the core by
# itself and only pays for the copies. Measured on one CPU core: LeNet (85k parameters) 2.4 times
# faster batched, ResNet-18 (11M) 1.4 times slower.
VMAP_PARAMETERS = 500_000


def update_function(
    model: nn.Module,
    *,
    loss: Loss = F.cross_entropy,
    reduction: Reduction = "mean",
    protocol: FedAvg | None = None,
    layers: Iterable[str] | None = None,
    extra_losses: bool = True,
) -> Callable[..., dict[str, Tensor]]:
    """The map (images, labels[, noise]) -> shared tensors of one client, differentiable in all.

    g = ∇θ L(x, y, θ), or (θ₀ − θ_T)/lr after T local steps. Safe under `vmap` and `vjp`. A
    stochastic model takes its noise as the third argument, fresh for every local step.

    Args:
        model: any module; it is not changed. BatchNorm in train mode uses batch statistics.
        loss: called as loss(outputs, labels, reduction=...); labels are class indices (batch,) or
            probabilities (batch, classes).
        reduction: "mean" or "sum" over the batch.
        protocol: local steps; None is one gradient.
        layers: shared layers; None shares every parameter that requires a gradient.
        extra_losses: add what the model's layers add to the loss, such as the KL divergence of a
            variational bottleneck; its reduction over the batch is that of the loss.

    Returns:
        A function of images (batch, channels, height, width), labels and noise as of
        `draw_noise`; it refuses noise that does not fit the model with a ValueError.

    Raises:
        ValueError: no trainable parameter, unknown layer, or dropout in train mode.
    """
    frozen = without_side_effects(model, noise=True)
    trainable = {n: p.detach() for n, p in frozen.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("expected a parameter with requires_grad=True, got none; unfreeze one")
    constant = {n: p.detach() for n, p in frozen.named_parameters() if not p.requires_grad}
    constant |= dict(frozen.named_buffers())
    shared = match_parameters(trainable, layers) if layers is not None else tuple(trainable)
    # Without local steps, layers that are not shared need no derivative at all.
    moving = tuple(trainable) if protocol and protocol.steps > 1 else shared
    start = {n: trainable[n] for n in moving}
    still = constant | {n: p for n, p in trainable.items() if n not in start}

    def local_loss(
        params: dict[str, Tensor], images: Tensor, labels: Tensor, noise: Noise
    ) -> Tensor:
        with collected_losses() as terms:
            outputs = functional_call(frozen, params | still | noise, (images,))
        value = loss(outputs, labels, reduction=reduction)
        return add_losses(value, terms, reduction) if extra_losses else value

    def update(images: Tensor, labels: Tensor, noise: Noise | None = None) -> dict[str, Tensor]:
        noise = noise or {}
        check_noise(frozen, noise, steps=protocol.steps if protocol else 1)
        params, total = start, None
        for step in range(protocol.steps if protocol else 1):
            grads = grad(local_loss)(params, images, labels, one_step(noise, step))
            if total is None:
                total = {n: grads[n] for n in shared}
            else:
                total = {n: total[n] + grads[n] for n in shared}
            if protocol and step + 1 < protocol.steps:
                params = {n: p - protocol.lr * grads[n] for n, p in params.items()}
        assert total is not None
        return total

    return update


@full_float32()
def share_gradient(
    model: nn.Module,
    victims: Victims | PrivateInputs,
    *,
    loss: Loss = F.cross_entropy,
    reduction: Reduction = "mean",
    protocol: FedAvg | None = None,
    layers: Iterable[str] | None = None,
    statistics: bool = False,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> SharedGradient:
    """Gradients of N victims at once: g_n = ∇θ L(x_n, y_n, θ), or L(x_n, y_n, ε_n, θ).

    Cost: one gradient evaluation per victim and local step.

    Args:
        model: the shared model; its mode (train or eval) is the client's.
        victims: images (victims, batch, channels, height, width) in [0, 1], or other inputs, and
            labels.
        loss: see `update_function`.
        reduction: "mean" or "sum" of the loss over the batch.
        protocol: FedAvg local steps; None shares the plain gradient.
        layers: names or prefixes of the layers to share; None shares all.
        statistics: also share each BatchNorm layer's input mean and variance, as a client that
            uploads its BatchNorm buffers does.
        chunk: victims per vmap; None chooses by network size.
        generator: draws the noise ε of a stochastic model, fresh for every victim and local step;
            a deterministic model needs none and leaves it alone.

    Returns:
        SharedGradient with detached tensors (victims, *parameter shape).

    Raises:
        ValueError: model and images differ in dtype or device, an unknown layer, dropout in train
            mode, labels or a loss that do not fit one logit, a stochastic model without a
            generator, or a gradient that is not finite.
    """
    check_inputs(model, victims.inputs)
    _check_one_logit(model, victims.labels, loss)
    update = update_function(
        model, loss=loss, reduction=reduction, protocol=protocol, layers=layers
    )
    noise = draw_noise(
        model, victims.inputs.shape[1], generator=generator,
        steps=protocol.steps if protocol else 1, clients=len(victims),
    )  # fmt: skip
    chunk = chunk or victim_chunk(model, victims.inputs)
    parts = []
    for rows in torch.arange(len(victims)).split(chunk):
        images, labels = victims.inputs[rows], victims.labels[rows]
        theirs = {n: e[rows] for n, e in noise.items()}
        if len(rows) == 1:
            own = {n: e[0] for n, e in theirs.items()}
            part = {n: g[None] for n, g in update(images[0], labels[0], own).items()}
        else:
            part = vmap(update)(images, labels, theirs)
        parts.append({n: g.detach() for n, g in part.items()})
    tensors = {n: torch.cat([part[n] for part in parts]) for n in parts[0]}
    shared = SharedGradient(tensors, victims.inputs.shape[1], reduction, protocol)
    check_finite(shared)
    if statistics:
        measured = [
            batchnorm_statistics(model, images, {n: e[v] for n, e in noise.items()})
            for v, images in enumerate(victims.inputs)
        ]
        if not measured[0]:
            raise ValueError("expected BatchNorm layers to share statistics of, got none")
        stacked = {
            n: (
                torch.stack([m[n][0].detach() for m in measured]),
                torch.stack([m[n][1].detach() for m in measured]),
            )
            for n in measured[0]
        }
        shared = replace(shared, statistics=stacked)
    return shared


def _check_one_logit(model: nn.Module, labels: Tensor, loss: Loss) -> None:
    """Refuse what one logit cannot tell: classes beyond 0 and 1, or the softmax of one class."""
    if isinstance(loss, MarginLoss):
        if not labels.is_floating_point() and bool(((labels < 0) | (labels > 1)).any()):
            raise ValueError(
                f"expected labels 0 or 1 for the {loss.name} loss of one logit, got "
                f"{sorted(set(labels.flatten().tolist()))}; map the classes to two, for example "
                "Victims(images, labels % 2)"
            )
        return
    matrices = [p for p in model.parameters() if p.ndim == 2]
    if loss is F.cross_entropy and matrices and len(matrices[-1]) == 1:
        raise ValueError(
            "expected at least two logits for cross-entropy, got one, whose softmax is always 1 "
            "and whose gradient is zero; pass loss=LOGISTIC (leaklib.margin_losses)"
        )


def victim_chunk(model: nn.Module, images: Tensor) -> int:
    """Victims to put into one vmap: all on a GPU or a small network, one on a large CPU one."""
    size = sum(p.numel() for p in model.parameters())
    return max(1, len(images)) if images.is_cuda or size <= VMAP_PARAMETERS else 1


def check_inputs(model: nn.Module, images: Tensor) -> None:
    """Refuse images whose dtype or device is not the model's, before any long work.

    Raises:
        ValueError: with the `.to(...)` call that mends it.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError("expected a model with parameters, got none")
    if first.dtype != images.dtype or first.device != images.device:
        raise ValueError(
            f"expected images of the model's dtype and device ({first.dtype}, {first.device}), got "
            f"({images.dtype}, {images.device}); call model.to(...) or victims.to(...)"
        )
