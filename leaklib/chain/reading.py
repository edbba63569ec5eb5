"""Reading a torch module as a chain of stages, or saying which layer is in the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from leaklib.chain.inverses import affine_map, invert_activation
from leaklib.chain.stages import (
    ConvStage,
    ElementwiseStage,
    LinearStage,
    PoolStage,
    ReshapeStage,
    ResidualStage,
    Shape,
    Stage,
)
from leaklib.layer_system.geometry import conv_geometry
from leaklib.models.registry import Normalise
from leaklib.models.residual import ResidualBlock

_INSTEAD = {
    nn.MaxPool2d: "it keeps one pixel of each window and forgets the others; use AvgPool2d or a "
    "stride, or attack by matching (leaklib.attacks.dlg)",
    nn.Dropout: "in train mode it draws a mask that the server does not see; call model.eval()",
    nn.GELU: "it is not monotone and has no inverse; use LeakyReLU, ELU or softplus, or attack by "
    "matching (leaklib.attacks.dlg)",
    nn.PReLU: "its slopes have gradients of their own; use LeakyReLU",
}


def read_chain(model: nn.Module, input_shape: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a model from the image to its output, weights in float64.

    Args:
        model: nested `nn.Sequential` of convolutions, fully connected layers, average pooling,
            flattening, `ResidualBlock`, normalisation with known statistics, and activations.
        input_shape: (channels, height, width) of one image.

    Returns:
        Stages whose composition is the model.

    Raises:
        ValueError: a layer that has no place in a chain, naming it, the reason and what to use;
            weights that two layers share; or an image shape that the model does not take.

    >>> read_chain(nn.Sequential(nn.Flatten(), nn.Linear(4, 1)), (1, 2, 2))[1].name
    '1'
    """
    stages: list[Stage] = []
    shape: Shape = tuple(input_shape)
    places: dict[int, str] = {}
    for name, module in _leaves(model, ""):
        for parameter in module.parameters():
            first = places.setdefault(id(parameter), name)
            if first != name:
                raise ValueError(
                    f"expected weights of its own in layer {name!r} ({type(module).__name__}), got "
                    f"those of layer {first!r}: the gradient of shared weights is the sum over "
                    "both places and not one layer's equations; attack by matching "
                    "(leaklib.attacks.dlg)"
                )
        try:
            read = _read(name, module, shape)
        except ValueError as error:
            raise ValueError(f"layer {name!r} ({type(module).__name__}): {error}") from error
        for stage in read:
            stages.append(stage)
            shape = stage.output_shape
    return tuple(stages)


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules of nested sequences in order; whatever is no plain sequence counts as one layer."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # named_children() leaves out a module's second place
        for child, part in module._modules.items():
            assert part is not None
            yield from _leaves(part, f"{name}.{child}" if name else child)
    else:
        yield name, module


def _read(name: str, module: nn.Module, shape: Shape) -> list[Stage]:
    if isinstance(module, nn.Conv2d):
        return [_convolution(name, module, shape)]
    if isinstance(module, nn.Linear):
        if shape != (module.in_features,):
            raise ValueError(
                f"expected {module.in_features} features, gets {shape}; check the image shape"
            )
        return [LinearStage(name, _double(module.weight), _maybe(module.bias))]
    if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        return [_pool(name, module, shape)]
    if isinstance(module, nn.Flatten):
        if module.start_dim != 1 or module.end_dim != -1:
            raise ValueError("expected Flatten() over all axes but the first")
        return [ReshapeStage(name, shape, (_size(shape),))]
    if isinstance(module, ResidualBlock):
        return _residual(name, module, shape)
    if isinstance(module, Normalise):
        std, mean = _double(module.std), _double(module.mean)
        return [ElementwiseStage(name, affine_map("normalisation", 1 / std, -mean / std), shape)]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return [_batch_normalisation(name, module, shape)]
    if isinstance(module, nn.Dropout) and not module.training:
        return []
    inverse = invert_activation(module)
    if inverse is not None:
        return [ElementwiseStage(name, inverse, shape)]
    for kind, instead in _INSTEAD.items():
        if isinstance(module, kind):
            raise ValueError(instead)
    raise ValueError(
        "expected a chain (nn.Sequential) of convolutions, linear layers, average pooling, "
        "flattening, ResidualBlock and invertible activations; attack other models by matching "
        "(leaklib.attacks.dlg)"
    )


def _convolution(name: str, module: nn.Conv2d, shape: Shape) -> ConvStage:
    if len(shape) != 3 or shape[0] != module.in_channels:
        raise ValueError(
            f"expected images of {module.in_channels} channels, gets {shape}; check the image shape"
        )
    geometry = conv_geometry(module, shape)
    return ConvStage(name, geometry, _double(module.weight), _maybe(module.bias))


def _pool(name: str, module: nn.AvgPool2d | nn.AdaptiveAvgPool2d, shape: Shape) -> PoolStage:
    if len(shape) != 3:
        raise ValueError(f"expected images, gets {shape}; pool before flattening")
    out = module(torch.zeros(1, *shape))
    return PoolStage(name, module, shape, tuple(out.shape[1:]))


def _residual(name: str, module: ResidualBlock, shape: Shape) -> list[Stage]:
    first = _convolution(f"{name}.conv1", module.conv1, shape)
    inner, outer = invert_activation(module.act1), invert_activation(module.act2)
    if inner is None or outer is None:
        raise ValueError("expected invertible activations; use LeakyReLU, ELU or softplus")
    activation = ElementwiseStage(f"{name}.act1", inner, first.output_shape)
    second = _convolution(f"{name}.conv2", module.conv2, first.output_shape)
    last = ElementwiseStage(f"{name}.act2", outer, second.output_shape)
    if module.shortcut is None:
        return [first, activation, second, last]
    across = module.shortcut
    shortcut = (
        _convolution(f"{name}.shortcut", across, shape) if isinstance(across, nn.Conv2d) else None
    )
    return [ResidualStage(name, first, activation, second, shortcut), last]


def _batch_normalisation(
    name: str, module: nn.modules.batchnorm._BatchNorm, shape: Shape
) -> ElementwiseStage:
    if module.training or module.running_mean is None or module.running_var is None:
        raise ValueError(
            "expected running statistics, but in train mode it uses those of the private batch; "
            "call model.eval()"
        )
    place = (-1, *([1] * (len(shape) - 1)))
    gain = (_double(module.running_var) + module.eps).rsqrt()
    shift = -_double(module.running_mean) * gain
    if module.affine:
        gain, shift = gain * _double(module.weight), shift * _double(module.weight)
        shift = shift + _double(module.bias)
    silent = (gain == 0).nonzero()[:, 0].tolist()
    if silent:
        raise ValueError(
            f"expected gains other than 0, got 0 for channel {silent[0]}, whose values are lost; "
            "attack by matching (leaklib.attacks.dlg)"
        )
    return ElementwiseStage(
        name, affine_map("BatchNorm", gain.view(place), shift.view(place)), shape
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _maybe(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _double(bias)


def _size(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
