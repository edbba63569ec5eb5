"""Putting a bottleneck in front of a layer of any model."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leaklib.defenses.bottleneck import Bottleneck, ConvolutionalBottleneck, VariationalBottleneck
from leaklib.seeding import global_seed

KINDS: dict[str, type[Bottleneck]] = {
    "vb": VariationalBottleneck,
    "cvb": ConvolutionalBottleneck,
}


def insert_bottleneck(
    model: nn.Module,
    before: str = "fc",
    *,
    image_shape: tuple[int, ...] | None = None,
    example: Tensor | None = None,
    kind: Literal["vb", "cvb"] = "vb",
    seed: int = 0,
    **settings: Any,
) -> nn.Module:
    """A copy of the model with a variational bottleneck in front of one layer.

    Layer m becomes (bottleneck, m): its parameters move from "m.weight" to "m.layer.weight", and
    the bottleneck's are "m.bottleneck.encoder.weight" and so on. Sizes come from one forward pass.

    Args:
        model: any module; not changed.
        before: name of the layer, at any depth; it must be called once per forward pass, on one
            tensor. PRECODE takes the last one; the convolutional form stands after the first block,
            that is before the second.
        image_shape: (channels, height, width) of one image, or the shape of another floating-point
            input; or give `example`.
        example: a batch of inputs, for a model that takes no floating-point numbers.
        kind: "vb" for `VariationalBottleneck`, "cvb" for `ConvolutionalBottleneck`.
        seed: of the bottleneck's weights, PyTorch's default start; torch's global generator stays
            as it was.
        **settings: of the bottleneck, such as width=256 and kl_weight=1e-3.

    Returns:
        The new model, in the modes, dtype and device of the old one.

    Raises:
        ValueError: an unknown layer or setting, a layer that is not called, called more than once
            or on something else than one tensor (batch, ...), or a bad setting.

    PRECODE's perceptron on 3x32x32 pictures:

    >>> from leaklib.models import build
    >>> model = insert_bottleneck(build("mlp"), image_shape=(3, 32, 32))
    >>> f"{sum(p.numel() for p in model.parameters()):,}"
    '4,994,570'
    """
    layer = named_layer(model, before)
    _check_settings(kind, settings)
    inputs = example_inputs(model, image_shape, example)
    feature_shape = _feature_shape(model, before, inputs)
    parameter = next(model.parameters())
    with global_seed(seed):
        bottleneck = KINDS[kind](feature_shape, **settings)
    bottleneck.to(parameter.device, parameter.dtype).train(layer.training)
    changed = copy.deepcopy(model)
    parent = changed.get_submodule(before.rpartition(".")[0])
    pair = nn.Sequential(
        OrderedDict(bottleneck=bottleneck, layer=changed.get_submodule(before))
    )  # fmt: skip
    pair.training = layer.training
    setattr(parent, before.rpartition(".")[2], pair)
    _check_reached(changed, before, inputs)
    return changed


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    known = dict(model.named_modules())
    if not name or name not in known:
        raise ValueError(
            f"expected the name of a layer, got {name!r}; known: {', '.join(filter(None, known))}"
        )
    return known[name]


def example_inputs(
    model: nn.Module, image_shape: tuple[int, ...] | None, example: Tensor | None
) -> Tensor:
    """Inputs for a forward pass that only measures shapes: the example, or two blank images.

    Raises:
        ValueError: not exactly one of the two, or a model without parameters.
    """
    if (image_shape is None) == (example is None):
        raise ValueError(
            "expected image_shape=(channels, height, width) or example=inputs, got "
            f"{'neither' if example is None else 'both'}"
        )
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("expected a model with parameters, got none")
    if example is not None:
        floating = example.is_floating_point()
        return example.to(parameter.device, parameter.dtype if floating else example.dtype)
    assert image_shape is not None
    return torch.zeros(2, *image_shape, dtype=parameter.dtype, device=parameter.device)


def run_probe(probe: nn.Module, inputs: Tensor) -> None:
    """One forward pass that only measures; torch's global generator stays as it was.

    Raises:
        ValueError: the model does not accept the inputs; with its answer.
    """
    try:
        with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            probe(inputs)
    except RuntimeError as error:
        raise ValueError(
            "expected an image_shape or example that the model accepts, got inputs of shape "
            f"{tuple(inputs.shape)}; the model answered: {str(error).splitlines()[0]}"
        ) from error


@torch.no_grad()
def _check_reached(changed: nn.Module, before: str, inputs: Tensor) -> None:
    """Refuse a bottleneck that the forward pass goes around."""
    calls: list[None] = []
    probe = copy.deepcopy(changed).eval()
    probe.get_submodule(f"{before}.bottleneck").register_forward_pre_hook(
        lambda _layer, _args: calls.append(None)
    )
    try:
        run_probe(probe, inputs)
    except AttributeError as error:
        raise ValueError(
            f"expected a model that only calls layer {before!r}, it also reads from it: {error}"
        ) from error
    if len(calls) != 1:
        raise ValueError(
            f"expected layer {before!r} to be reached by this name, the model calls it by another "
            "one; give that name"
        )


@torch.no_grad()
def _feature_shape(model: nn.Module, name: str, inputs: Tensor) -> tuple[int, ...]:
    """Shape of what enters the layer, without the batch axis."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    probe = copy.deepcopy(model).eval()
    probe.get_submodule(name).register_forward_pre_hook(
        lambda _layer, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run_probe(probe, inputs)
    if len(calls) != 1:
        raise ValueError(
            f"expected layer {name!r} to be called once per forward pass, it was called "
            f"{len(calls)} times; name another layer"
        )
    args, kwargs = calls[0]
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim < 2 or (
        len(args[0]) != len(inputs)
    ):  # fmt: skip
        got = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
        raise ValueError(
            f"expected layer {name!r} to take one tensor (batch, features), got {got} and "
            f"keywords {sorted(kwargs)}; name another layer"
        )
    return tuple(args[0].shape[1:])


def _check_settings(kind: str, settings: dict[str, Any]) -> None:
    if kind not in KINDS:
        raise ValueError(f"expected kind among {', '.join(KINDS)}, got {kind!r}")
    parameters = inspect.signature(KINDS[kind]).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"unknown setting {unknown[0]!r} of the bottleneck: {', '.join(known)}")
