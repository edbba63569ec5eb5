"""Labels from the gradient of the last layer, before any image is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leaklib.gradients.payload import SharedGradient
from leaklib.gradients.stateless import without_side_effects
from leaklib.gradients.stochastic import draw_noise, one_step


def last_layer(shared: SharedGradient) -> tuple[str, str | None]:
    """Names of the last shared matrix and of its bias (None if there is none).

    Raises:
        ValueError: no fully connected layer was shared.
    """
    matrices = [n for n, t in shared.items() if t.ndim == 3]
    if not matrices:
        raise ValueError(
            "expected the gradient of a fully connected last layer, got only "
            f"{', '.join(shared.names)}; share it, or give the labels"
        )
    weight = matrices[-1]
    bias = weight.removesuffix("weight") + "bias"
    has_bias = bias in shared.tensors and shared.tensors[bias].ndim == 2
    return weight, bias if has_bias else None


def check_last_layer(model: nn.Module, shared: SharedGradient) -> None:
    """Refuse label recovery when the model's last layer was not shared.

    Raises:
        ValueError: naming the layer that is missing.
    """
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    if not matrices or matrices[-1] not in shared.tensors:
        raise ValueError(
            f"expected the gradient of the last layer ({matrices[-1] if matrices else 'none'}) to "
            f"read labels from, got {', '.join(shared.names)}; share it, or give the labels"
        )


def recover_label(shared: SharedGradient) -> Tensor:
    """Label of a single image: iDLG's sign rule, exact but for noise and rounding.

    ∂L/∂z_c = p_c − 1[c = y] is negative for the true class alone, and it is the bias gradient.
    Without a bias, row c of the weight gradient is ∂L/∂z_c · aᵀ; the true row is the longest,
    because |p_y − 1| is the sum of all other entries. Where p_y rounds to 1, no entry is negative
    and the answer is a guess. Source: Zhao, Mopuri & Bilen 2020, who compare the signs of the rows
    of the weight gradient. Here the bias is read, or the length of the rows.

    Args:
        shared: cross-entropy gradient of one image a victim, with a hard label.

    Returns:
        Labels (victims, 1).

    Raises:
        ValueError: batch > 1 (use `recover_labels`), no last layer was shared, one logit, or two
            classes without a bias.
    """
    if shared.batch != 1:
        raise ValueError(
            f"expected batch 1, got {shared.batch}; use dlg(labels=recover_labels(shared), ...)"
        )
    weight, bias = last_layer(shared)
    if shared.tensors[weight].shape[1] == 1:
        raise ValueError(
            "expected at least two logits to read the label off, got one; give the labels, or use "
            "the recursive attack (leaklib.attacks.rgap), which finds them"
        )
    if bias is not None:
        return shared.tensors[bias].argmin(dim=1, keepdim=True)
    rows = shared.tensors[weight]
    if rows.shape[1] < 3:
        raise ValueError("expected the bias of the last layer, or at least 3 classes, to tell the "
                         "labels apart; got neither")  # fmt: skip
    return rows.norm(dim=2).argmax(dim=1, keepdim=True)


def recover_labels(shared: SharedGradient, *, probabilities: Tensor | None = None) -> Tensor:
    """Labels of a batch, as a multiset, from the bias gradient of the last layer.

    Summed over the batch, ∂L/∂z_c = Σ_i p_ic − n_c, with n_c images of class c. Subtract what the
    attacker expects of Σ_i p_ic, then take the class with the most negative entry, raise it by
    one, and go on. Exact whenever the expectation is off by less than 1/2 in every class; without
    `probabilities`, whenever every class collects less than one image's probability. Source: our
    derivation. Wainakh et al. 2022 also take the classes one by one, from the weight gradient; Yin
    et al. 2021 read labels without repetition.

    Args:
        shared: cross-entropy gradient; the bias of the last layer is needed if batch > 1.
        probabilities: what the model predicts for an unknown image (classes,), for example the
            mean over random images; None expects nothing.

    Returns:
        Sorted labels (victims, batch).

    Raises:
        ValueError: no last layer, or batch > 1 without its bias.
    """
    if shared.batch == 1:
        return recover_label(shared)
    _, bias = last_layer(shared)
    if bias is None:
        raise ValueError("expected the bias gradient of the last layer for batch > 1, got none; "
                         "give the labels")  # fmt: skip
    signal = shared.tensors[bias].clone()
    if shared.reduction == "mean":
        signal = signal * shared.batch
    if shared.protocol is not None:
        signal = signal / shared.protocol.steps
    if probabilities is not None:
        signal = signal - shared.batch * probabilities
    rows = torch.arange(shared.victims, device=shared.device)
    labels = []
    for _ in range(shared.batch):
        label = signal.argmin(dim=1)
        signal[rows, label] += 1.0
        labels.append(label)
    return torch.stack(labels, dim=1).sort(dim=1).values


def expected_probabilities(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    generator: torch.Generator,
    samples: int = 64,
) -> Tensor:
    """Mean prediction of the model on uniform random images, (classes,): an attacker's guess.

    A stochastic model gets noise of its own for every image.
    """
    first = next(model.parameters())
    frozen = without_side_effects(model, noise=True)
    images = torch.rand(samples, *image_shape, generator=generator, device=generator.device)
    noise = one_step(draw_noise(model, samples, generator=generator), 0)
    with torch.no_grad():
        logits = functional_call(frozen, noise, (images.to(first.device, first.dtype),))
        return logits.softmax(1).mean(0)
