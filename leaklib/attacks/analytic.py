"""Closed-form recovery of the input of a fully connected layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from leaklib.attacks.labels import check_last_layer, recover_label
from leaklib.attacks.reconstruction import Reconstruction
from leaklib.gradients.payload import SharedGradient, check_payload


def invert_linear(weight_grad: Tensor, bias_grad: Tensor) -> Tensor:
    """Input of a fully connected layer: x = (∂L/∂W)ᵀ k / (kᵀk), k = ∂L/∂z = ∂L/∂b.

    ∂L/∂W = k xᵀ is an outer product, so every row gives x up to a factor; this is the least-squares
    answer over all rows, which keeps small |k_j| from spoiling it. Source: Phong et al. 2018, who
    divide one row; taking all rows is our choice.

    Args:
        weight_grad: (..., outputs, inputs).
        bias_grad: (..., outputs).

    Returns:
        Inputs (..., inputs), exact up to rounding for one image; NaN where k = 0.

    >>> k, x = torch.tensor([2.0, -1.0]), torch.tensor([0.25, 0.5, 1.0])
    >>> invert_linear(torch.outer(k, x), k)
    tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    weight_grad, bias_grad = weight_grad.double(), bias_grad.double()
    energy = bias_grad.square().sum(-1, keepdim=True)
    return torch.einsum("...oi,...o->...i", weight_grad, bias_grad) / energy


def invert_row(weight_grad: Tensor, bias_grad: Tensor) -> Tensor:
    """Input of a fully connected layer from one row: x = (∂L/∂W)_j / k_j, j = argmax |k_j|.

    Where noise or pruning spoils the rows differently, the row of the largest k_j is the naive
    choice; `invert_linear` takes all rows. Source: Phong et al. 2018; the choice of j is ours.

    Args:
        weight_grad: (..., outputs, inputs).
        bias_grad: (..., outputs).

    Returns:
        Inputs (..., inputs), float64; NaN where k = 0.

    >>> k, x = torch.tensor([2.0, -3.0]), torch.tensor([0.25, 0.5, 1.0])
    >>> invert_row(torch.outer(k, x), k)
    tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    row = bias_grad.abs().argmax(-1, keepdim=True)
    index = row[..., None].expand(*row.shape, weight_grad.shape[-1])
    return weight_grad.double().gather(-2, index)[..., 0, :] / bias_grad.double().gather(-1, row)


def analytic(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, int, int],
    layer: str | None = None,
    labels: Tensor | None = None,
    rows: Literal["all", "largest"] = "all",
) -> Reconstruction:
    """The private image itself, when the first layer is fully connected with a bias.

    Exact for one image a victim, also after FedAvg's local steps, since the input of the layer is
    the same in every step. Cost: one pass over the layer's gradient.

    Args:
        model: the shared model; its input normalisation is undone.
        shared: the released gradients, batch 1.
        image_shape: (channels, height, width).
        layer: name of the first layer; None takes the first one as wide as the image.
        labels: (victims, 1) if known; None recovers them from the last layer.
        rows: "all" by least squares (`invert_linear`), or the "largest" alone (`invert_row`).

    Returns:
        Reconstruction with objective 0 and no evaluations.

    Raises:
        ValueError: batch > 1, no such layer, its bias is missing or its gradient is zero.
    """
    if rows not in ("all", "largest"):
        raise ValueError(f"expected rows 'all' or 'largest', got {rows!r}")
    weight, bias = first_layer_gradient(model, shared, image_shape, layer)
    flat = invert_linear(weight, bias) if rows == "all" else invert_row(weight, bias)
    if not torch.isfinite(flat).all():
        victim = int((~torch.isfinite(flat).all(1)).nonzero()[0])
        raise ValueError(
            f"expected a bias gradient that is not zero, got zero for victim {victim}: no neuron "
            "of the layer was active"
        )
    return as_reconstruction(model, shared, flat, image_shape, labels)


def first_layer_gradient(
    model: nn.Module,
    shared: SharedGradient,
    image_shape: tuple[int, int, int],
    layer: str | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of the fully connected layer that takes the image.

    Returns:
        (victims, outputs, inputs) and (victims, outputs).

    Raises:
        ValueError: batch > 1, no such layer, or its bias is missing.
    """
    check_payload(model, shared)
    if shared.batch != 1:
        raise ValueError(
            f"expected batch 1, got {shared.batch}: a batch leaks only a mixture of its images; "
            "use a matching attack"
        )
    if len(image_shape) != 3:
        raise ValueError(f"expected image_shape (channels, height, width), got {image_shape}")
    size = image_shape[0] * image_shape[1] * image_shape[2]
    layer = layer or _first_layer(model, size)
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    if weight not in shared.tensors or bias not in shared.tensors:
        raise ValueError(
            f"expected the gradients {weight!r} and {bias!r}, got {', '.join(shared.names)}; "
            "without them use a matching attack"
        )
    if shared.tensors[weight].shape[-1] != size:
        raise ValueError(
            f"expected layer {layer!r} to take {size} inputs (the image), it takes "
            f"{shared.tensors[weight].shape[-1]}; name the first layer"
        )
    return shared.tensors[weight], shared.tensors[bias]


def as_reconstruction(
    model: nn.Module,
    shared: SharedGradient,
    flat: Tensor,
    image_shape: tuple[int, int, int],
    labels: Tensor | None,
) -> Reconstruction:
    """The input of the first layer (victims, inputs) as pixels, with labels; a closed form."""
    images = _undo_normalisation(model, flat.view(-1, 1, *image_shape)).to(shared.dtype)
    none = torch.zeros(shared.victims, device=shared.device)
    if labels is None:
        check_last_layer(model, shared)
        labels = recover_label(shared)
    if labels.shape != (shared.victims, 1):
        raise ValueError(
            f"expected labels (victims, 1) = ({shared.victims}, 1), got {tuple(labels.shape)}"
        )
    return Reconstruction(images, labels, none, none.long())


def _first_layer(model: nn.Module, size: int) -> str:
    """Name of the first fully connected layer that takes the whole image."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            break
        if isinstance(module, nn.Linear) and module.in_features == size:
            return name
    raise ValueError(
        f"expected a model whose first layer is fully connected with {size} inputs, got none; "
        "use a matching attack, or give layer="
    )


def _undo_normalisation(model: nn.Module, images: Tensor) -> Tensor:
    """Back to pixels, where the model normalises its input itself."""
    for module in model.modules():
        mean, std = getattr(module, "mean", None), getattr(module, "std", None)
        if isinstance(mean, Tensor) and isinstance(std, Tensor):
            shape = (-1, 1, 1)
            return images * std.double().view(shape) + mean.double().view(shape)
    return images
