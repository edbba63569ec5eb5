"""Closed-form recovery of an image from the first layer of a vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaklib.attacks.analytic import as_reconstruction
from leaklib.attacks.reconstruction import Reconstruction
from leaklib.gradients.payload import SharedGradient, check_payload


def invert_patches(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, int, int],
    labels: Tensor | None = None,
    embedding: str = "patches",
    positions: str = "tokens.positions",
) -> Reconstruction:
    """The private image, where patches are embedded by one matrix and learned positions are added.

    Token t is W x_t + p_t, so ∂L/∂p_t = k_t is the gradient at the embedded patch, and

        ∂L/∂W = Σ_t k_t x_tᵀ

    is a linear system for all patches x_t: `dim` equations for as many unknowns as there are
    patches, for each pixel of a patch. It is solved by least squares. What happens behind the
    tokens does not matter, so a bottleneck there protects nothing. Exact up to rounding where the
    k_t are independent, which needs dim >= patches.

    Cost: one least-squares solution of dim x patches per victim.
    Source: that the gradient of the positions gives a transformer away is from Lu et al. 2022
    (APRIL, arXiv 2112.14087), for its attention; the system of the embedding is ours.

    Args:
        model: the shared model; its input normalisation is undone.
        shared: the released gradients, batch 1.
        image_shape: (channels, height, width).
        labels: (victims, 1) if known; None recovers them from the last layer.
        embedding: the convolution that embeds patches, its kernel as large as its stride.
        positions: the parameter (tokens, dim) that is added; the patches are its last rows.

    Returns:
        Reconstruction with objective 0 and no evaluations. Pixels are not boxed.

    Raises:
        ValueError: batch > 1, layers that do not fit or were not shared, or dim < patches.
    """
    check_payload(model, shared)
    if shared.batch != 1:
        raise ValueError(f"expected batch 1, got {shared.batch}; use a matching attack")
    weight = f"{embedding}.weight"
    if weight not in shared.tensors or positions not in shared.tensors:
        raise ValueError(
            f"expected the gradients {weight!r} and {positions!r}, got "
            f"{', '.join(shared.names)}; name the layers, or use a matching attack"
        )
    layer = model.get_submodule(embedding)
    if not isinstance(layer, nn.Conv2d) or layer.stride != layer.kernel_size:
        raise ValueError(f"expected a convolution with kernel = stride, got {layer}")
    height, width = layer.kernel_size
    count = (image_shape[1] // height) * (image_shape[2] // width)
    slopes = shared.tensors[positions][:, -count:].double()  # k_t, (victims, patches, dim)
    if slopes.shape[1] != count or slopes.shape[2] < count:
        raise ValueError(
            f"expected {count} positions of at least {count} features, got "
            f"{tuple(shared.tensors[positions].shape[1:])}: too few equations; use a matching "
            "attack"
        )
    rows = shared.tensors[weight].double().flatten(2)  # (victims, dim, pixels of a patch)
    patches = torch.linalg.lstsq(slopes.mT, rows).solution
    images = F.fold(patches.mT, image_shape[1:], layer.kernel_size, stride=layer.kernel_size)
    return as_reconstruction(model, shared, images.flatten(1), image_shape, labels)
