"""Inner products of weight-gradient tangents, layer by layer, from activations alone.

A linear or convolutional layer with input a and output gradient k = ∂L/∂z has the weight gradient
Σ_t k_t A_tᵀ, where A holds for every output position t the patch of the input that it sees. Along
an input direction u its tangent is

    ġ_u = k̇_u Aᵀ + k Ȧ_uᵀ,      and K_uv = ⟨ġ_u, ġ_v⟩ is what this file is about.

Both terms are linear in the tangents (k̇_u, ȧ_u), so K_uv = ⟨h_u, s_v⟩ for features h ("held") and
s ("streamed") that need no more memory than activations, where that is less than the weights.
Samples of a batch and positions are one axis: the weight gradient sums over both alike.

Source: derived here for the J of Zhang et al. 2023 (I²F), Eq. 4; for a linear layer and plain
gradients instead of tangents it is the per-example norm of Goodfellow 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["weights", "adjoint", "kernel"]
FORMS: tuple[Form, ...] = ("weights", "adjoint", "kernel")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class MatrixLayer:
    """A linear or convolutional layer as a sum over positions.

    Attributes:
        weight: whether its weight is shared.
        bias: whether its bias is shared.
        groups: G of a convolution; 1 for a linear layer.
        outputs: channels o out of one group.
        inputs: channels i into one group.
        seen: (offsets S, positions T) the input position that an output position sees at an offset,
            P where it sees padding; None when every position sees itself alone.
        seen_by: (offsets S, positions P) the inverse: the output position, T where there is none.
        positions: (T, P), output and input positions, samples included.
        channel_axis: of inputs and outputs.
        form: how K is contracted.
    """

    weight: bool
    bias: bool
    groups: int
    outputs: int
    inputs: int
    seen: Tensor | None
    seen_by: Tensor | None
    positions: tuple[int, int]
    channel_axis: int
    form: Form = "weights"

    @property
    def offsets(self) -> int:
        """S, entries of the kernel."""
        return 1 if self.seen is None else len(self.seen)


def matrix_layer(
    module: nn.Module, in_shape: torch.Size, out_shape: torch.Size, *, weight: bool, bias: bool
) -> MatrixLayer:
    """Describe a linear or convolutional layer that met an input of this shape.

    Args:
        module: an `nn.Linear`, or an `nn.Conv1d`, `2d`, `3d` with zero padding.
        in_shape: (..., features), or (batch, channels, *positions).
        out_shape: likewise.
        weight: whether its weight is shared.
        bias: whether its bias is shared.

    Returns:
        The layer; its form is not chosen yet.
    """
    if isinstance(module, nn.Linear):
        t = prod(out_shape[:-1])
        return MatrixLayer(
            weight, bias, 1, module.out_features, module.in_features, None, None, (t, t), -1
        )
    assert isinstance(module, CONVOLUTIONS)
    g = module.groups
    seen = _seen(module, in_shape, out_shape).to(module.weight.device)
    t, p = (shape[0] * prod(shape[2:]) for shape in (out_shape, in_shape))
    seen_by = seen.new_full((len(seen), p + 1), t)
    # At one offset two output positions never see the same input position: nothing is overwritten
    # but the slot of the padding, which is dropped.
    seen_by.scatter_(1, seen, torch.arange(t, device=seen.device).expand_as(seen))
    pointwise = len(seen) == 1 and t == p and bool((seen[0] == torch.arange(t).to(seen)).all())
    return MatrixLayer(
        weight, bias, g, module.out_channels // g, module.in_channels // g,
        None if pointwise else seen, None if pointwise else seen_by[:, :p].contiguous(),
        (t, p), 1,
    )  # fmt: skip


def _seen(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, in_shape: torch.Size, out_shape: torch.Size
) -> Tensor:
    """(offsets, batch · output positions): which of the batch · input positions is seen there."""
    batch, sizes, count = in_shape[0], in_shape[2:], len(in_shape) - 2
    index, inside = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
    for i in range(count):
        reach = module.dilation[i] * (module.kernel_size[i] - 1)
        # "same" puts the odd one of the padding behind, as torch does
        before = {"same": reach // 2, "valid": 0}.get(str(module.padding))
        padding = module.padding[i] if before is None else before
        assert isinstance(padding, int)
        offset = torch.arange(module.kernel_size[i]) * module.dilation[i] - padding
        place = offset[:, None] + torch.arange(out_shape[2 + i]) * module.stride[i]
        axes = [1] * (2 * count)
        axes[i], axes[count + i] = place.shape
        place = place.view(axes)
        index = index * sizes[i] + place
        inside = inside & (place >= 0) & (place < sizes[i])
    index, inside = (v.flatten(0, count - 1).flatten(1) for v in (index, inside))
    each = prod(sizes)
    index = index[:, None] + each * torch.arange(batch)[:, None]  # (offsets, batch, positions)
    return index.where(inside[:, None], batch * each).flatten(1)


def costs(layer: MatrixLayer, directions: int) -> dict[Form, float]:
    """Multiply-adds of one direction in K of k directions, by form.

    With n = G·o·i·S weights, T output and P input positions, and k/2 pairs per direction:

        weights   n (T + P)            + k/2 · n                     ġ is formed for every direction
        adjoint   2 n (T + P)          + k/2 · (G·o·T + G·i·P)       ġ is formed and mapped back
        kernel    G (o T² + i P²)      + k/2 · (G·o·T + G·i·P + 2 G T²)     ġ is never formed
                  + G (o + i S) T²

    The factor of k/2 is also the memory that one direction holds.
    """
    g, o, i, s = layer.groups, layer.outputs, layer.inputs, layer.offsets
    t, p = layer.positions
    n, pairs = g * o * i * s, directions / 2
    active = g * (o * t + i * p)
    kernel = g * (o * t**2 + i * p**2 + (o + i * s) * t**2)
    return {
        "weights": n * (t + p) + pairs * n,
        "adjoint": 2 * n * (t + p) + pairs * active,
        "kernel": kernel + pairs * (active + 2 * g * t**2),
    }


def held_entries(layer: MatrixLayer) -> int:
    """Entries that one direction holds in the layer's form."""
    g, (t, p) = layer.groups, layer.positions
    size = {
        "weights": g * layer.outputs * layer.inputs * layer.offsets,
        "adjoint": g * (layer.outputs * t + layer.inputs * p),
        "kernel": g * (layer.outputs * t + layer.inputs * p + 2 * t**2),
    }
    return layer.weight * size[layer.form] + layer.bias * g * layer.outputs


def features(
    layer: MatrixLayer, a: Tensor, k: Tensor, a_dot: Tensor, k_dot: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Features with Σ ⟨held_u, streamed_v⟩ = ⟨ġ_u, ġ_v⟩, weight and bias of one layer.

    Below g counts groups, o and i channels, s offsets, t and r output positions, p and q input
    positions; A[i, s, t] is the patch that t sees and D[o, s, p] the output gradient of the
    position that sees p. Then ġ = k̇ Aᵀ + ȧ Dᵀ, and

        weights   h = s = ġ
        adjoint   h = (ġ A, ġᵀ D),                       s = (k̇, ȧ)
        kernel    h = (k̇ AᵀA, ȧ DᵀD, kᵀk̇, ȦᵀA),          s = (k̇, ȧ, ȦᵀA, kᵀk̇)

    Args:
        layer: the layer.
        a: (batch, channels, *positions) or (..., features), its input.
        k: likewise, the gradient with respect to its output.
        a_dot: (directions, *shape of a), tangents.
        k_dot: (directions, *shape of k), tangents.

    Returns:
        Two lists of (directions, entries).
    """
    a, k = _columns(layer, a[None])[0], _columns(layer, k[None])[0]
    a_dot, k_dot = _columns(layer, a_dot), _columns(layer, k_dot)
    held: list[Tensor] = []
    streamed: list[Tensor] = []
    if layer.weight and layer.form == "kernel":
        patches, gradients = _patches(layer, a), _select(layer.seen_by, k)
        moved = _patches(layer, a_dot)
        within = torch.einsum("got,ugor->ugtr", k, k_dot)
        across = torch.einsum("ugmt,gmr->ugtr", moved, patches)
        held += [
            torch.einsum("ugot,gtr->ugor", k_dot, torch.einsum("gmt,gmr->gtr", patches, patches)),
            torch.einsum(
                "ugip,gpq->ugiq", a_dot, torch.einsum("gosp,gosq->gpq", gradients, gradients)
            ),
            within,
            across,
        ]
        streamed += [k_dot, a_dot, across, within]
    elif layer.weight:
        patches, gradients = _select(layer.seen, a), _select(layer.seen_by, k)
        tangent = torch.einsum("ugot,gist->ugois", k_dot, patches)
        tangent = tangent + torch.einsum("ugip,gosp->ugois", a_dot, gradients)
        if layer.form == "adjoint":
            held += [
                torch.einsum("ugois,gist->ugot", tangent, patches),
                torch.einsum("ugois,gosp->ugip", tangent, gradients),
            ]
            streamed += [k_dot, a_dot]
        else:
            held.append(tangent)
            streamed.append(tangent)
    if layer.bias:
        held.append(k_dot.sum(-1))
        streamed.append(held[-1])
    return [h.flatten(1) for h in held], [s.flatten(1) for s in streamed]


def _columns(layer: MatrixLayer, value: Tensor) -> Tensor:
    """(directions, batch, channels, *positions) -> (directions, groups, channels, positions)."""
    axis = 2 if layer.channel_axis == 1 else -1
    value = value.movedim(axis, 1)
    return value.reshape(value.shape[0], layer.groups, value.shape[1] // layer.groups, -1)


def _select(index: Tensor | None, value: Tensor) -> Tensor:
    """(..., positions) -> (..., offsets, selected positions); padding selects 0."""
    if index is None:
        return value.unsqueeze(-2)
    return F.pad(value, (0, 1))[..., index]


def _patches(layer: MatrixLayer, value: Tensor) -> Tensor:
    """(..., channels, P) -> (..., channels · offsets, T)."""
    return _select(layer.seen, value).flatten(-3, -2)
