"""Which parameters lie before a bottleneck, in it and after it.

PRECODE makes the gradients of the bottleneck and of all later layers stochastic, the paper says. In
fact the output gradient of every layer is random, also before the bottleneck; what differs is
whether the noise reaches the layer's input. An attacker drops the layers whose input it reaches; a
defender perturbs the others.
Source: arXiv 2208.04767 (abstract) for the idea; the convolutional preset from the released code of
arXiv 2309.04515. That the published attack drops the whole bottleneck is our reading.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leaklib.defenses.insertion import example_inputs, named_layer, run_probe
from leaklib.gradients.stochastic import StochasticLayer

Preset = Literal["all", "ignore_bottleneck_and_after", "ignore_decoder_and_after"]
PRESETS: tuple[Preset, ...] = get_args(Preset)


@dataclass(frozen=True)
class BottleneckParts:
    """Names of all trainable parameters, by their place relative to a bottleneck.

    Attributes:
        before: what runs before the bottleneck.
        encoder: the bottleneck's encoder.
        decoder: the bottleneck's decoder.
        after: what runs after it.
    """

    before: tuple[str, ...]
    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    after: tuple[str, ...]


def layer_order(
    model: nn.Module,
    image_shape: tuple[int, ...] | None = None,
    *,
    example: Tensor | None = None,
) -> tuple[str, ...]:
    """Names of the layers that hold parameters, in the order of their first call.

    Args:
        model: any module; not changed.
        image_shape: as in `insert_bottleneck`; or give `example`.
        example: a batch of inputs.

    Returns:
        Module names; "" is the model itself, where it holds parameters of its own. A layer that is
        not called is left out.

    >>> from leaklib.models import build
    >>> layer_order(build("mlp"), (3, 32, 32))
    ('hidden1', 'hidden2', 'fc')
    """
    calls = _calls(model, example_inputs(model, image_shape, example))
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    return tuple(name for name in calls if name in owners)


def bottleneck_parts(
    model: nn.Module,
    image_shape: tuple[int, ...] | None = None,
    *,
    example: Tensor | None = None,
    bottleneck: str | None = None,
) -> BottleneckParts:
    """Sort the trainable parameters by their place relative to the bottleneck.

    A parameter has the place of its layer in the order of execution; a layer that is not called by
    itself has that of the called module around it. Parameters held by a module that contains the
    bottleneck (a position embedding, a class token) are before it if its input depends on them.

    Args:
        model: a model with a bottleneck; not changed.
        image_shape: as in `insert_bottleneck`; or give `example`.
        example: a batch of inputs.
        bottleneck: its name, where the model has several.

    Returns:
        The parts; together all parameters that require a gradient.

    Raises:
        ValueError: no bottleneck, several and none named, or one that is not called.
    """
    name = _find(model, bottleneck)
    inputs = example_inputs(model, image_shape, example)
    calls = _calls(model, inputs)
    if name not in calls:
        raise ValueError(f"expected bottleneck {name!r} to be called, it was not; remove it")
    reached = _inputs_of(model, name, inputs)
    parts: dict[str, list[str]] = {"before": [], "encoder": [], "decoder": [], "after": []}
    for parameter, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        if parameter.startswith(f"{name}."):
            inside = parameter.removeprefix(f"{name}.")
            parts["encoder" if inside.startswith("encoder.") else "decoder"].append(parameter)
            continue
        owner = parameter.rpartition(".")[0]
        while owner not in calls:
            owner = owner.rpartition(".")[0]
        around = owner == "" or name.startswith(f"{owner}.")
        early = parameter in reached if around else calls.index(owner) < calls.index(name)
        parts["before" if early else "after"].append(parameter)
    return BottleneckParts(**{part: tuple(names) for part, names in parts.items()})


def attack_layers(
    model: nn.Module,
    preset: Preset = "ignore_bottleneck_and_after",
    image_shape: tuple[int, ...] | None = None,
    **where: Any,
) -> tuple[str, ...]:
    """Parameters that an attacker compares, to be passed on as `Matching(layers=...)`.

    Args:
        model: a model with a bottleneck.
        preset: "all"; "ignore_bottleneck_and_after", which keeps the layers before, whose inputs
            the noise does not reach (their output gradients are random all the same); or
            "ignore_decoder_and_after", which keeps the encoder too: its weight gradient holds the
            features.
        image_shape: as in `insert_bottleneck`.
        **where: `example` and `bottleneck` as in `bottleneck_parts`.

    Returns:
        Parameter names.

    Raises:
        ValueError: an unknown preset, or nothing left to compare.
    """
    if preset not in PRESETS:
        raise ValueError(f"expected a preset among {', '.join(PRESETS)}, got {preset!r}")
    if preset == "all":
        return tuple(n for n, p in model.named_parameters() if p.requires_grad)
    parts = bottleneck_parts(model, image_shape, **where)
    kept = parts.before + (parts.encoder if preset == "ignore_decoder_and_after" else ())
    if not kept:
        raise ValueError(
            "expected layers before the bottleneck, got none: it is the first; insert it later"
        )
    return kept


def _find(model: nn.Module, bottleneck: str | None) -> str:
    if bottleneck is not None:
        layer = named_layer(model, bottleneck)
        inside = [n for n, m in layer.named_modules() if isinstance(m, StochasticLayer)]
        if len(inside) == 1:  # itself, or the one that `insert_bottleneck(before=...)` put there
            return f"{bottleneck}.{inside[0]}".removesuffix(".")
        every = [n for n, m in model.named_modules() if isinstance(m, StochasticLayer)]
        raise ValueError(
            f"expected the name of one bottleneck, got {bottleneck!r}; known: {every or 'none'}"
        )
    found = [n for n, m in model.named_modules() if isinstance(m, StochasticLayer)]
    if len(found) != 1:
        raise ValueError(
            f"expected one bottleneck, got {found or 'none'}; "
            + ("name it: bottleneck=..." if found else "insert_bottleneck(model, ...) makes one")
        )
    return found[0]


@torch.no_grad()
def _calls(model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Names of all modules in the order of their first call."""
    order: dict[str, None] = {}
    probe = copy.deepcopy(model).eval()
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, name=name: order.setdefault(name))
    run_probe(probe, inputs)
    return tuple(order)


def _inputs_of(model: nn.Module, name: str, inputs: Tensor) -> set[str]:
    """Parameters that the input of the layer depends on."""
    seen: list[Tensor] = []
    probe = copy.deepcopy(model).eval().requires_grad_(True)
    probe.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.enable_grad():
        run_probe(probe, inputs)
        parameters = dict(probe.named_parameters())
        if not seen[0].requires_grad:
            return set()
        grads = torch.autograd.grad(seen[0].sum(), list(parameters.values()), allow_unused=True)
    return {n for n, grad in zip(parameters, grads, strict=True) if grad is not None}
