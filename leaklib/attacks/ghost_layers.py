"""Which layers' gradients follow from activations, and how.

A layer with input a and output gradient δ = ∂L/∂z has, summed over the samples and positions t of
a client's batch,

    linear, convolution    W: Σ_t δ_t p_tᵀ,   b: Σ_t δ_t,   p_t the patch (or vector) that t sees
    normalisation          γ: Σ_t δ_t ⊙ x̂_t,  β: Σ_t δ_t,   x̂ the normalised input
    positions of tokens    Σ_b δ_b, and of the class token its entry 0

so one forward and one backward pass of all clients' samples together hold every client's gradient,
if no sample sees another.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from leaklib.gradients.stochastic import collected_losses, noise_shapes
from leaklib.influence.ghost import normalised
from leaklib.influence.ghost_plan import graph_uses, hooked
from leaklib.models.vision_transformer import Tokens
from leaklib.precision import full_float32

# Exact types: a subclass may use its weights in ways of its own.
_MATRIX = (nn.Linear, nn.Conv2d)
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KNOWN = (*_MATRIX, *_BATCHNORMS, nn.GroupNorm, nn.LayerNorm, Tokens)


@dataclass(frozen=True, eq=False)
class GhostLayer:
    """A layer whose gradient is made of its input and output gradient.

    Attributes:
        released: own name of each compared parameter, such as "weight" -> its name in the payload.
        positions: T, output positions of one sample that share the weight.
        entries: of one sample's patches, and its share of a gradient that is formed.
        factored: whether its weight gradient is contracted and not formed: where T is so small
            that this is cheaper.
    """

    released: dict[str, str]
    positions: int
    entries: int
    factored: bool


def find_layers(
    model: nn.Module, names: tuple[str, ...], *, image_shape: tuple[int, ...], batch: int
) -> tuple[dict[str, GhostLayer], int] | None:
    """Sort the compared parameters by layer, where all of them follow from activations.

    That needs layers of a known type with the samples as their first axis; one use of each compared
    parameter in the graph of the output and of the terms that layers add to the loss; no hooks; and
    samples that do not see each other. Passes of a random sample among others tell the last.

    Cost: a forward and a backward pass of two samples, and a forward pass of three.

    Args:
        model: a copy of the shared model without side effects (`without_side_effects`).
        names: the compared parameters.
        image_shape: (channels, height, width), or the shape of another input.
        batch: samples of a client.

    Returns:
        Layer name -> layer, and the entries that one sample carries through the network (inputs and
        outputs of all layers of a known type); None where the generic problem is needed.
    """
    if not all(_is_plain(module) for module in model.modules()):
        return None
    known = {n: m for n, m in model.named_modules() if _is_known(m)}
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        layer, _, own = name.rpartition(".")
        if layer not in known or own not in _own_names(known[layer]):
            return None
        layers.setdefault(layer, {})[own] = name
    shapes = _probe(model, known, tuple(layers), names, image_shape)
    if shapes is None:
        return None
    carried = sum(prod(shape[1:]) for pair in shapes.values() for shape in pair)
    return {n: _describe(known[n], own, shapes[n][1], batch) for n, own in layers.items()}, carried


def columns(module: nn.Module, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Patches p and output gradients δ of a linear layer or convolution, position by position.

    Args:
        module: the layer.
        a: (samples, ..., in) or (samples, in, height, width), its input.
        delta: likewise, the gradient of its output.

    Returns:
        (samples, T, entries of a patch), (samples, T, out).
    """
    if isinstance(module, nn.Conv2d):
        padding = _padding(module)
        assert padding is not None  # `find_layers` has seen to it
        patches = F.unfold(
            a, module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride
        )
        return patches.mT, delta.flatten(2).mT
    samples = len(a)
    return a.reshape(samples, -1, a.shape[-1]), delta.reshape(samples, -1, delta.shape[-1])


def small_gradients(module: nn.Module, a: Tensor, delta: Tensor, batch: int) -> dict[str, Tensor]:
    """Gradients of everything but weight matrices, (rows, ...), by own name.

    Args:
        module: the layer.
        a: (rows · batch, ...), its input.
        delta: the gradient of its output, likewise.
        batch: samples of a row.
    """

    def total(value: Tensor, *kept: int) -> Tensor:
        """Sum of a row's samples, with these axes of a sample kept."""
        value = value.unflatten(0, (-1, batch))
        rest = [i for i in range(1, value.ndim) if i - 1 not in kept]
        return value.sum(rest)

    if isinstance(module, Tokens):
        return {"positions": total(delta, 1, 2), "class_token": total(delta[:, :1], 2)}
    if isinstance(module, nn.LayerNorm):
        kept = range(delta.ndim - len(module.normalized_shape), delta.ndim)
        centred = F.layer_norm(a, module.normalized_shape, eps=module.eps)
        return {"weight": total(delta * centred, *kept), "bias": total(delta, *kept)}
    channel = delta.ndim - 1 if isinstance(module, nn.Linear) else 1
    bias = total(delta, channel)
    if isinstance(module, _MATRIX):
        return {"bias": bias}
    return {"weight": total(delta * normalised(module, a), channel), "bias": bias}


def _is_plain(module: nn.Module) -> bool:
    """Nothing was hung onto the module that its class does not show."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return "forward" not in vars(module) and not any(hooks)


def _is_known(module: nn.Module) -> bool:
    if type(module) not in _KNOWN:
        return False
    if not isinstance(module, nn.Conv2d):
        return True
    plain = module.groups == 1 and module.padding_mode == "zeros"
    return plain and _padding(module) is not None


def _own_names(module: nn.Module) -> tuple[str, str]:
    """The parameters of a known layer; somebody may have registered more."""
    return ("class_token", "positions") if isinstance(module, Tokens) else ("weight", "bias")


def _padding(module: nn.Conv2d) -> tuple[int, ...] | None:
    """Zeros put before and behind the picture; None where the two numbers differ."""
    if isinstance(module.padding, tuple):
        return module.padding
    if module.padding == "valid":
        return (0, 0)
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)


@full_float32()
def _probe(
    model: nn.Module,
    known: dict[str, nn.Module],
    compared: tuple[str, ...],
    names: tuple[str, ...],
    image_shape: tuple[int, ...],
) -> dict[str, tuple[torch.Size, torch.Size]] | None:
    """Shapes of inputs and outputs of the known layers; None where activations would not do."""
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    pair = torch.rand(2, *image_shape, generator=generator)
    # the same first sample in other company: more samples, and far larger ones
    crowd = torch.cat([pair[:1], 3 * torch.randn(2, *image_shape, generator=generator)])
    leaves = {n: p.detach().requires_grad_(n in names) for n, p in model.named_parameters()}
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def run(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the loss is made of, and the outputs of the compared layers."""
        outputs: dict[str, Tensor] = {}

        def note(name: str, _module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
            shapes[name], outputs[name] = (value.shape, output.shape), output
            return output.clone()  # which may be overwritten

        noise = {n: x.new_zeros(len(x), *s[2:]) for n, s in noise_shapes(model, 1).items()}
        with hooked(known, note), collected_losses() as terms:
            out = functional_call(model, leaves | noise, (x,))
        sizes = [out.shape, *(size for n in compared for size in shapes[n])]
        if any(size[0] != len(x) for size in sizes) or any(t.shape != x.shape[:1] for t in terms):
            raise RuntimeError("expected samples as the first axis")
        return [out, *terms], [outputs[n] for n in compared]

    try:
        with torch.enable_grad():
            x = pair.to(first).requires_grad_()
            ends, outputs = run(x)
            total = torch.stack([end[0].square().sum() for end in ends]).sum()
            # autograd refuses outputs that nobody uses, and inputs that were overwritten although
            # a layer's gradient needs them
            slope, *_ = torch.autograd.grad(total, [x, *outputs, *(leaves[n] for n in names)])
        with torch.no_grad():
            again = run(crowd.to(first))
    except Exception:
        return None  # a model may raise anything; the generic problem reports it
    uses = graph_uses(total, leaves)
    pairs = zip([*ends, *outputs], [*again[0], *again[1]], strict=True)
    fine = (
        all(_alike(one[0], other[0]) for one, other in pairs)
        and not slope[1].any()
        and all(uses[n] == 1 for n in names)
    )
    return shapes if fine else None


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding alone, which batches of different sizes may do."""
    return bool((one - other).norm() <= torch.finfo(one.dtype).eps ** 0.5 * one.norm())


def _describe(
    module: nn.Module, released: dict[str, str], out_shape: torch.Size, batch: int
) -> GhostLayer:
    if not isinstance(module, _MATRIX):
        return GhostLayer(released, positions=1, entries=0, factored=False)
    out, into = len(module.weight), module.weight[0].numel()
    positions = prod(out_shape[1:]) // out
    # pairs of positions and the factors of the target, against forming δᵀp
    factored = 2 * batch * positions * (out + into) <= out * into
    formed = 0 if factored else out * into // batch
    return GhostLayer(released, positions, positions * into + formed, factored=factored)
