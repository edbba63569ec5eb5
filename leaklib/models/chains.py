"""Chains of convolutions with one logit: the networks that R-GAP attacks and their variants.

Every chain is `conv1, act1, conv2, act2, ..., flatten, fc`, without normalisation and pooling, so
that each layer is a linear system about its input. A layer is (filters, kernel, stride, padding).
R-GAP's networks have no biases: a bias in the last layer would hand over the margin.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from leaklib.models.initialisation import Activation
from leaklib.models.networks import Shape, mlp

# filters, kernel, stride, padding
Layer = tuple[int, int, int, int]

LENET: tuple[Layer, ...] = ((12, 5, 2, 2), (12, 5, 2, 2), (12, 5, 1, 2))


def chain(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    layers: Sequence[Sequence[int]] = LENET,
    bias: bool = True,
    head_bias: bool | None = None,
) -> nn.Sequential:
    """Any chain of square convolutions, each with its activation, then a linear layer.

    The default is DLG's LeNet with an invertible activation.

    Args:
        input_shape: channels, height, width.
        classes: outputs of `fc`.
        activation: makes one activation module.
        layers: (filters, kernel, stride, padding) of each convolution, from the image on.
        bias: in all layers, `fc` included.
        head_bias: in `fc`; None follows `bias`.

    Returns:
        Layers conv1, act1, conv2, act2, ..., flatten, fc.

    Raises:
        ValueError: a layer that is no such quadruple, or a kernel larger than its padded input.
    """
    channels, height, width = input_shape
    network: OrderedDict[str, nn.Module] = OrderedDict()
    for number, layer in enumerate(layers, start=1):
        filters, kernel, stride, padding = _checked(number, layer)
        network[f"conv{number}"] = nn.Conv2d(
            channels, filters, kernel, stride=stride, padding=padding, bias=bias
        )
        network[f"act{number}"] = activation()
        smallest = min(height, width)
        if kernel > smallest + 2 * padding:
            raise ValueError(
                f"conv{number}: expected a kernel of at most {smallest + 2 * padding}, the padded "
                f"height or width of its input, got {kernel}; add padding or use larger images"
            )
        channels = filters
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    network["flatten"] = nn.Flatten()
    head = bias if head_bias is None else head_bias
    network["fc"] = nn.Linear(channels * height * width, classes, bias=head)
    return nn.Sequential(network)


def cnn6(
    input_shape: Shape, classes: int, activation: Activation, *, second: int = 36
) -> nn.Sequential:
    """R-GAP's CNN6: six convolutions and one logit, no biases; every layer has full rank.

    125,456 parameters on 3x32x32 with one output. `second` counts the filters of conv2: with 36,
    28 or 24 every layer still has full rank, with 20 it has not (see `cnn6_d`).

    Source: Zhu & Blaschko, R-GAP (arXiv 2010.07733), released code.
    """
    layers = (
        (12, 4, 2, 2), (second, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1),
        (128, 3, 1, 1),
    )  # fmt: skip
    return chain(input_shape, classes, activation, layers=layers, bias=False)


def cnn6_d(input_shape: Shape, classes: int, activation: Activation) -> nn.Sequential:
    """R-GAP's CNN6-d: CNN6 with 20 instead of 36 filters in conv2, whose rank is then too low.

    118,544 parameters on 3x32x32 with one output.

    Source: Zhu & Blaschko, R-GAP (arXiv 2010.07733), released code.
    """
    return cnn6(input_shape, classes, activation, second=20)


def fcn3(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    hidden: Sequence[int] = (1000, 100),
    last_activation: bool = True,
) -> nn.Sequential:
    """R-GAP's FCN3: three fully connected layers without biases, an activation behind the last.

    884,100 parameters on 1x28x28 with one output. Layers flatten, hidden1, act1, hidden2, act2, fc,
    act3. The released code has `act3` although its attack reckons without; `last_activation=False`
    is the network that the attack takes it for.

    Source: Zhu & Blaschko, R-GAP (arXiv 2010.07733), released code, branch main, whose LeakyReLU
    has slope 0.2 (0.01 in branch dev).
    """
    network = mlp(input_shape, classes, activation, hidden=hidden, bias=False)
    if last_activation:
        network.add_module(f"act{len(hidden) + 1}", activation())
    return network


def lenet_rgap(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    widths: Sequence[int] = (12, 12, 12),
) -> nn.Sequential:
    """R-GAP's LeNet: three 5x5 convolutions with strides 2, 2, 1 and one logit, no biases.

    8,088 parameters on 1x28x28 with one output. `widths` are the filters of the convolutions, for
    the variants of the rank analysis. The released code draws its weights by `init="tiny"`.

    Raises:
        ValueError: not three widths, or one below 1.

    Source: Zhu & Blaschko, R-GAP (arXiv 2010.07733), released code, branch dev.
    """
    if len(widths) != len(LENET):
        raise ValueError(f"widths: expected {len(LENET)} numbers of filters, got {tuple(widths)}")
    layers = [(width, *rest) for width, (_, *rest) in zip(widths, LENET, strict=True)]
    return chain(input_shape, classes, activation, layers=layers, bias=False)


def _checked(number: int, layer: Sequence[int]) -> Layer:
    if len(layer) != 4 or min(layer[:3]) < 1 or layer[3] < 0:
        raise ValueError(
            f"conv{number}: expected (filters, kernel, stride, padding), the first three >= 1 and "
            f"padding >= 0, got {tuple(layer)}"
        )
    filters, kernel, stride, padding = layer
    return filters, kernel, stride, padding
