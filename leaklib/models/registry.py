"""The papers' networks by name, with activation, initialisation and normalisation as settings.

    model = build("lenet", classes=100, init="uniform", seed=3)

Normalisation is the first layer of the model, so every attack works on pixels in [0, 1].
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from leaklib.models import chains, copa_networks, networks, residual, vision_transformer
from leaklib.models.initialisation import activation_by_name, check_initialisation, initialise_
from leaklib.seeding import global_seed

Builder = Callable[..., nn.Sequential]
BuilderT = TypeVar("BuilderT", bound=Builder)
Constants = tuple[Sequence[float], Sequence[float]]

# mean and standard deviation of the training pixels, as the papers' codes write them
NORMALISATIONS: dict[str, Constants] = {
    "mnist": ((0.13066373765468597,), (0.30810782313346863,)),
    "cifar10": ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
    "cifar10-precode": (
        (0.4914672374725342, 0.4822617471218109, 0.4467701315879822),
        (0.24703224003314972, 0.24348513782024384, 0.26158785820007324),
    ),
}


@dataclass(frozen=True)
class _Entry:
    builder: Builder
    activation: str | None
    smallest: int
    classes: int

    @property
    def options(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.builder).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


_REGISTRY: dict[str, _Entry] = {}


def register(
    name: str, *, activation: str | None, smallest: int = 1, classes: int = 10
) -> Callable[[BuilderT], BuilderT]:
    """Make a network known to `build` under `name`.

    The builder is called as `builder(input_shape, classes, activation, **options)`, or without
    `activation` where the network has none. It returns an `nn.Sequential` of named layers whose
    parameters are drawn from torch's global generator; its options are keyword-only arguments.
    The first line of its docstring becomes the description in `available_models`.

    Args:
        name: what users type.
        activation: name of the default activation; None for a network without one.
        smallest: smallest height and width of an image, in pixels.
        classes: number of outputs where the user gives none.

    Returns:
        A decorator that gives the builder back unchanged.

    Raises:
        ValueError: the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"a model named {name!r} is already registered: choose another name")

    def add(builder: BuilderT) -> BuilderT:
        _REGISTRY[name] = _Entry(builder, activation, smallest, classes)
        return builder

    return add


register("lenet", activation="sigmoid")(networks.lenet)
register("lenet4", activation="sigmoid")(networks.lenet4)
register("linear", activation=None)(networks.linear)
register("mlp", activation="relu")(networks.mlp)
register("convnet", activation="relu", smallest=9)(networks.convnet)
register("resnet18", activation="relu")(networks.resnet18)
register("cnn", activation="relu", smallest=29)(networks.cnn)
register("vit", activation="gelu", smallest=4)(vision_transformer.vit)
# R-GAP's binary networks: one logit
register("cnn6", activation="leaky_relu_0.2", classes=1)(chains.cnn6)
register("cnn6-d", activation="leaky_relu_0.2", classes=1)(chains.cnn6_d)
register("fcn3", activation="leaky_relu_0.2", classes=1)(chains.fcn3)
register("lenet-rgap", activation="sigmoid", classes=1)(chains.lenet_rgap)
register("chain", activation="leaky_relu_0.2")(chains.chain)
register("resnet-small", activation="leaky_relu_0.2")(residual.resnet_small)
# the layer-wise hybrid attack's networks
for _name, _plan in copa_networks.PLANS.items():
    register(_name, activation=_plan.activation, smallest=_plan.smallest)(
        copa_networks.copa_builder(_name)
    )


def available_models() -> dict[str, str]:
    """Every name that `build` knows, with one line of description.

    >>> list(available_models())[:3]
    ['lenet', 'lenet4', 'linear']
    """
    return {
        name: (inspect.getdoc(entry.builder) or "no description").splitlines()[0]
        for name, entry in _REGISTRY.items()
    }


def parameter_count(model: nn.Module) -> int:
    """Number p of scalar parameters; buffers such as running statistics do not count.

    >>> parameter_count(build("lenet", classes=100))
    85036
    >>> parameter_count(build("cnn6"))  # one logit unless told otherwise
    125456
    """
    return sum(parameter.numel() for parameter in model.parameters())


class Normalise(nn.Module):
    """First layer of a model: (pixels - mean) / std, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # shape (channels, 1, 1) broadcasts over images
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise pixels `(images, channels, height, width)`; the shape stays."""
        return (pixels - self.mean) / self.std


def build(
    name: str,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    classes: int | None = None,
    activation: str | None = None,
    init: str = "default",
    normalisation: str | Constants | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Sequential:
    """Build a network of the papers in eval mode, float32, on the CPU.

    The weights are those that a script gets which calls `torch.manual_seed(seed)`, constructs the
    layers from image to output, and then redraws them if `init` asks for it. The caller's global
    generators stay untouched. The names of the parameters do not depend on `normalisation`.

    Args:
        name: one of `available_models()`.
        input_shape: channels, height, width of one image.
        classes: number of outputs; None takes the network's own, 10, or 1 for the binary networks
            of R-GAP.
        activation: sigmoid, tanh, relu, leaky_relu, leaky_relu_0.2, elu, softplus, gelu or
            identity; None takes the network's own.
        init: default (the network's own: PyTorch's layer by layer, torchvision's for resnet18),
            uniform, normal, kaiming, xavier or tiny; see `initialisation.initialise_`.
        normalisation: None, "mnist", "cifar10" (I²F's constants), "cifar10-precode" (PRECODE's),
            or (mean, std) with one value for all channels or one per channel.
        seed: of the weights.
        **options: the network's own, such as `hidden` of "mlp" and `norm` of "convnet".

    Returns:
        Logits `(images, classes)` from pixels `(images, channels, height, width)`.

    Raises:
        ValueError: unknown name, activation, init, normalisation or option (the known ones are
            listed), an input smaller than the network allows, or constants that do not fit.
    """
    entry = _look_up(name)
    classes = entry.classes if classes is None else classes
    _check_shape(name, entry, input_shape, classes)
    check_initialisation(init)
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        known = ", ".join(entry.options) or "none"
        raise ValueError(f"model {name!r} has no option {', '.join(unknown)}; its options: {known}")
    arguments: list[Any] = [tuple(input_shape), classes]
    if entry.activation is not None:
        arguments.append(activation_by_name(activation or entry.activation))
    elif activation is not None:
        raise ValueError(f"model {name!r} has no activation: leave activation=None")
    with _seeded(seed):
        front = _normalise(normalisation, input_shape[0])
        model = entry.builder(*arguments, **options)
        if init != "default":
            initialise_(model, init, generator=torch.default_generator)
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"builder of {name!r}: expected nn.Sequential, got {type(model).__name__}")
    if front is not None:
        model = nn.Sequential(OrderedDict(normalise=front, **dict(model.named_children())))
    return model.eval()


def _look_up(name: str) -> _Entry:
    if name not in _REGISTRY:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(_REGISTRY)}")
    return _REGISTRY[name]


def _check_shape(name: str, entry: _Entry, input_shape: Sequence[int], classes: int) -> None:
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape: expected (channels, height, width), all at least 1, got {input_shape}"
        )
    if classes < 1:
        raise ValueError(f"classes: expected at least 1, got {classes}")
    channels, height, width = input_shape
    if min(height, width) < entry.smallest:
        raise ValueError(
            f"model {name!r} cannot take images of {height}x{width} pixels: the smallest are "
            f"{entry.smallest}x{entry.smallest}, input_shape=({channels}, {entry.smallest}, "
            f"{entry.smallest})"
        )


def _normalise(normalisation: str | Constants | None, channels: int) -> Normalise | None:
    if normalisation is None:
        return None
    if isinstance(normalisation, str):
        if normalisation not in NORMALISATIONS:
            known = ", ".join(NORMALISATIONS)
            raise ValueError(
                f"unknown normalisation {normalisation!r}: choose one of {known}, (mean, std) "
                "or None"
            )
        mean, std = NORMALISATIONS[normalisation]
    else:
        mean, std = normalisation
    if len(mean) != len(std) or len(mean) not in (1, channels) or min(std) <= 0:
        raise ValueError(
            f"normalisation: expected mean and std > 0 with 1 or {channels} values each, "
            f"got mean {tuple(mean)} and std {tuple(std)}"
        )
    return Normalise(mean, std)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch as after `torch.manual_seed(seed)` in a fresh script: CPU, float32; restored after."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with global_seed(seed), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
