"""How the papers draw a network's weights, and activations by name.

The papers' attacks depend strongly on the initialisation, so the draws follow the papers' order
exactly: walk the layers from the image to the output, draw the weight, then the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# builds one activation module, so that no two places of a network share a module
Activation: TypeAlias = Callable[[], nn.Module]

# none of them works in place: an in-place change breaks the second differentiation of an attack
ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "leaky_relu_0.2": partial(nn.LeakyReLU, 0.2),
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}

INITIALISATIONS = ("default", "uniform", "normal", "kaiming", "xavier", "tiny")

# standard deviations of the initialisations that draw weight and bias from one normal law
_NORMAL_STD = {"normal": 0.5, "tiny": 0.01}


def activation_by_name(name: str) -> Activation:
    """The maker of the activation called `name`.

    Parameters are PyTorch's defaults, but for a slope in the name: "leaky_relu_0.2" is R-GAP's,
    "leaky_relu" has slope 0.01.

    Raises:
        ValueError: the name is unknown; the known ones are listed.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_initialisation(init: str) -> None:
    """Refuse an unknown initialisation.

    Raises:
        ValueError: the name is unknown; the known ones are listed.
    """
    if init not in INITIALISATIONS:
        raise ValueError(
            f"unknown initialisation {init!r}: choose one of {', '.join(INITIALISATIONS)}"
        )


@torch.no_grad()
def initialise_(model: nn.Module, init: str, *, generator: torch.Generator) -> nn.Module:
    """Redraw every convolution and linear layer in place, in order, weight before bias.

    With `fan_in` and `fan_out` of the weight w:

        default   w, b ~ U(±1/√fan_in), PyTorch's own rule
        uniform   w, b ~ U(±0.5), DLG and I²F
        normal    w, b ~ N(0, 0.5²)
        kaiming   w ~ U(±√(3/fan_in)), that is Kaiming with the sigmoid's gain 1; b ~ U(±0.5)
        xavier    w ~ U(±√(6/(fan_in + fan_out))); b ~ U(±0.5)
        tiny      w, b ~ N(0, 0.01²), R-GAP's study of noise

    Normalisation layers keep their parameters. I²F's released code applies its `normal` rule twice
    to the weight and never to the bias; here the bias gets it, as its branch for the bias suggests.

    Args:
        model: changed in place; any device and dtype.
        init: one of the names above.
        generator: source of the draws, on the device of the model. Building a model with `init`
            equals `initialise_` with `torch.default_generator` in the state after construction.

    Returns:
        The same model.

    Raises:
        ValueError: unknown `init`.

    Source: released code of DLG (arXiv 1906.08935) for `uniform`, of R-GAP (arXiv 2010.07733) for
    `tiny`, and of I²F (arXiv 2309.13016), its study of initialisation, for the rest.
    """
    check_initialisation(init)
    for module in model.modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            _draw_weight(module.weight, init, generator)
            if module.bias is not None:
                _draw_bias(module.bias, module.weight, init, generator)
    return model


def _draw_weight(weight: Tensor, init: str, generator: torch.Generator) -> None:
    if init == "default":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    elif init == "uniform":
        weight.uniform_(-0.5, 0.5, generator=generator)
    elif init in _NORMAL_STD:
        weight.normal_(0.0, _NORMAL_STD[init], generator=generator)
    elif init == "kaiming":
        nn.init.kaiming_uniform_(weight, nonlinearity="sigmoid", generator=generator)
    else:
        nn.init.xavier_uniform_(weight, generator=generator)


def _draw_bias(bias: Tensor, weight: Tensor, init: str, generator: torch.Generator) -> None:
    if init in _NORMAL_STD:
        bias.normal_(0.0, _NORMAL_STD[init], generator=generator)
        return
    bound = 1 / math.sqrt(weight[0].numel()) if init == "default" else 0.5
    bias.uniform_(-bound, bound, generator=generator)
