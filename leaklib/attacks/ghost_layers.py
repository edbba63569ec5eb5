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

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from leaklib.gradients.stochastic import noise_shapes
from leaklib.influence.ghost import normalised
from leaklib.influence.ghost_plan import graph_uses, hooked
from leaklib.models.vision_transformer import Tokens

# Exact types: a subclass may use its weights in ways of its own.
_MATRIX = (nn.Linear, nn.Conv2d)
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KNOWN = (*_MATRIX, *_BATCHNORMS, nn.GroupNorm, nn.LayerNorm, Tokens)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True, eq=False)
class GhostLayer:
    """A layer whose gradient is made of its input and output gradient.

    Attributes:
        released: own name of each compared parameter, such as "weight" -> its name in the payload.
        positions: T, output positions of one sample that share the weight.
        entries: of one sample's input, output and patches together.
        factored: whether its weight gradient is contracted and not formed: where T is so small
            that this is cheaper.
    """

    released: dict[str, str]
    positions: int
    entries: int
    factored: bool


def find_layers(
    model: nn.Module, names: tuple[str, ...], *, image_shape: tuple[int, ...], batch: int
) -> dict[str, GhostLayer] | None:
    """Sort the compared parameters by layer, where all of them follow from activations.

    That needs layers of a known type, called once; one use of each compared parameter in the graph
    of the output; no hooks; and samples that do not see each other, which one pass of two random
    samples tells.

    Cost: two forward passes and a backward pass of two samples.

    Args:
        model: a copy of the shared model that nobody else uses.
        names: the compared parameters.
        image_shape: (channels, height, width), or the shape of another input.
        batch: samples of a client.

    Returns:
        Layer name -> layer, or None where the generic problem is needed.
    """
    if not all(_is_plain(module) for module in model.modules()):
        return None
    known = {n: m for n, m in model.named_modules() if _is_known(m)}
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        layer, _, own = name.rpartition(".")
        if layer not in known:
            return None
        layers.setdefault(layer, {})[own] = name
    shapes = _probe(model, {n: known[n] for n in layers}, names, image_shape)
    if shapes is None:
        return None
    return {n: _describe(known[n], own, *shapes[n], batch) for n, own in layers.items()}


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
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, _BATCHNORMS):
        return not module.training and module.running_mean is not None
    # in train mode the generic problem says what to do
    return not (isinstance(module, _DROPOUT) and module.training)


def _is_known(module: nn.Module) -> bool:
    if type(module) not in _KNOWN:
        return False
    if not isinstance(module, nn.Conv2d):
        return True
    plain = module.groups == 1 and module.padding_mode == "zeros"
    return plain and _padding(module) is not None


def _padding(module: nn.Conv2d) -> tuple[int, ...] | None:
    """Zeros put before and behind the picture; None where the two numbers differ."""
    if isinstance(module.padding, tuple):
        return module.padding
    if module.padding == "valid":
        return (0, 0)
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)


def _probe(
    model: nn.Module,
    modules: dict[str, nn.Module],
    names: tuple[str, ...],
    image_shape: tuple[int, ...],
) -> dict[str, tuple[torch.Size, torch.Size]] | None:
    """Shapes of the layers' inputs and outputs; None where activations would not do."""
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x, other = torch.rand(2, 2, *image_shape, generator=generator).to(first)
    other[0] = x[0]
    still = {n: first.new_zeros(2, *shape[2:]) for n, shape in noise_shapes(model, 1).items()}
    calls: Counter[str] = Counter()
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str, _module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
        calls[name] += 1
        shapes[name] = value.shape, output.shape
        return output.clone()  # which may be overwritten

    leaves = {n: p.detach().requires_grad_(n in names) for n, p in model.named_parameters()}
    if any(n not in leaves for n in names):
        return None  # a second name of tied weights
    try:
        with torch.enable_grad(), hooked(modules, note):
            out = functional_call(model, leaves | still, (x.requires_grad_(),))
            # autograd refuses if an input that a layer's gradient needs was overwritten
            slope, *_ = torch.autograd.grad(
                out[0].square().sum(), [x, *(leaves[n] for n in names)], retain_graph=True
            )
        with torch.no_grad():
            again = functional_call(model, still, (other,))
    except RuntimeError:
        return None  # the generic problem reports it
    uses = graph_uses(out, leaves)
    fine = (
        torch.allclose(out[0], again[0])
        and not slope[1].any()
        and all(calls[n] == 1 for n in modules)
        and all(uses[n] == 1 for n in names)
    )
    return shapes if fine else None


def _describe(
    module: nn.Module,
    released: dict[str, str],
    in_shape: torch.Size,
    out_shape: torch.Size,
    batch: int,
) -> GhostLayer:
    entries = prod(in_shape[1:]) + prod(out_shape[1:])
    if not isinstance(module, _MATRIX):
        return GhostLayer(released, 1, entries, factored=False)
    out, into = len(module.weight), module.weight[0].numel()
    positions = prod(out_shape[1:]) // out
    # pairs of positions and the factors of the target, against forming δᵀp
    factored = 2 * batch * positions * (out + into) <= out * into
    formed = 0 if factored else out * into // batch
    return GhostLayer(released, positions, entries + positions * into + formed, factored=factored)
