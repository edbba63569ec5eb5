"""The small block of the gradient rows: K = I ⊗ K̃, one block for all channels of a group.

K̃ has filters·taps rows and one column a pixel of a single channel. Where it has full column rank,
the gradient alone gives every channel of the input, with no help from the weight rows and hence
from none of the layers behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leaklib.layer_system.geometry import Geometry


def gradient_block(geometry: Geometry, preactivation_grad: Tensor) -> Tensor:
    """K̃: entry ((f, tap), pixel) is k of filter f at the position whose tap meets the pixel.

    Args:
        geometry: sizes of the layer.
        preactivation_grad: (victims, filters, height, width).

    Returns:
        (victims, groups, filters per group · taps, height · width of the input). Cost: its size;
        quadratic in the number of pixels where there is one filter a pixel.
    """
    (rows, columns), (down, right) = geometry.output_size, geometry.stride
    height, width = geometry.input_shape[1:]
    top, left = geometry.padding
    k = preactivation_grad
    place = k.new_zeros(len(k), geometry.filters, *geometry.kernel, height, width)
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            # input row met by output row o: o·stride + i·dilation − padding
            r = [o * down + i * geometry.dilation[0] - top for o in range(rows)]
            c = [o * right + j * geometry.dilation[1] - left for o in range(columns)]
            inside_r = [o for o, at in enumerate(r) if 0 <= at < height]
            inside_c = [o for o, at in enumerate(c) if 0 <= at < width]
            if not inside_r or not inside_c:
                continue
            to_r = slice(r[inside_r[0]], r[inside_r[-1]] + 1, down)
            to_c = slice(c[inside_c[0]], c[inside_c[-1]] + 1, right)
            from_r = slice(inside_r[0], inside_r[-1] + 1)
            from_c = slice(inside_c[0], inside_c[-1] + 1)
            place[:, :, i, j, to_r, to_c] = k[:, :, from_r, from_c]
    return place.reshape(len(k), geometry.groups, -1, height * width)


def grouped_weight_grad(geometry: Geometry, weight_grad: Tensor) -> Tensor:
    """∂L/∂W as right-hand sides of the block: (victims, groups, filters·taps, channels)."""
    victims = len(weight_grad)
    grad = weight_grad.view(victims, geometry.groups, -1, *geometry.weight_shape[1:])
    return grad.movedim(3, -1).reshape(victims, geometry.groups, -1, geometry.weight_shape[1])


def solve_block(block: Tensor, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Solve min ‖K̃ x_c − g_c‖ for every channel at once, where K̃ has full column rank.

    Cholesky of the Gram matrix with one step of refinement (corrected semi-normal equations).

    Args:
        block: (victims, groups, rows, pixels).
        weight_grad: (victims, groups, rows, channels), see `grouped_weight_grad`.

    Returns:
        x (victims, groups, pixels, channels), and the condition number of the worst group
        (victims,), inf where the Gram matrix is not positive definite to rounding.
    """
    gram = block.mT @ block
    values = torch.linalg.eigvalsh(gram)
    positive = values[..., 0] > 1e-14 * values[..., -1]
    condition = torch.where(
        positive, (values[..., -1] / values[..., 0].clamp_min(1e-300)).sqrt(), torch.inf
    ).amax(1)
    # where the block is not usable the answer is not used either: the identity stands in
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(torch.where(positive[..., None, None], gram, identity))
    x = torch.cholesky_solve(block.mT @ weight_grad, factor)
    x = x + torch.cholesky_solve(block.mT @ (weight_grad - block @ x), factor)
    return x, condition
