"""The papers' networks, each a chain of named layers that ends in a linear layer called `fc`.

Every builder takes the shape of one image `(channels, height, width)`, the number of classes and
a maker of activations; its own options follow as keywords. Weights are drawn from the global
generator, by PyTorch's default in the order image to output unless the builder says otherwise.
`leaklib.models` names the builders, seeds the generator and puts the normalisation in front.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from leaklib.models.initialisation import Activation

Shape = tuple[int, int, int]


def lenet(
    input_shape: Shape, classes: int, activation: Activation, *, norm: str = "none"
) -> nn.Sequential:
    """DLG's LeNet: three 5x5 convolutions with 12 channels and strides 2, 2, 1, then linear.

    85,036 parameters on 3x32x32 with 100 classes, 15,826 with 10. `norm` ("none", "batch" or
    "group") puts a normalisation behind every convolution, to study what it changes; the published
    network has none.

    Source: Zhu, Liu, Han, Deep Leakage from Gradients (arXiv 1906.08935), released code.
    """
    return _lenet(input_shape, classes, activation, strides=(2, 2, 1), norm=norm)


def lenet4(input_shape: Shape, classes: int, activation: Activation) -> nn.Sequential:
    """I²F's LeNet: four 5x5 convolutions with 12 channels and strides 2, 2, 1, 1, then linear.

    17,038 parameters on 1x28x28 with 10 classes, 19,438 on 3x32x32.

    Source: Zhang et al., Inversion Influence Functions (arXiv 2309.13016), released code.
    """
    return _lenet(input_shape, classes, activation, strides=(2, 2, 1, 1))


def _lenet(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    strides: Sequence[int],
    norm: str = "none",
) -> nn.Sequential:
    channels, height, width = input_shape
    layer = _normalisation_layer(norm, 2, known=("none", "batch", "group"))
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for number, stride in enumerate(strides, start=1):
        chain[f"conv{number}"] = nn.Conv2d(channels, 12, 5, stride=stride, padding=2)
        if layer is not None:
            chain[f"norm{number}"] = layer(12)
        chain[f"act{number}"] = activation()
        # padding keeps the size, so only the stride shrinks it
        channels, height, width = 12, -(-height // stride), -(-width // stride)
    chain["flatten"] = nn.Flatten()
    chain["fc"] = nn.Linear(channels * height * width, classes)
    return nn.Sequential(chain)


def linear(input_shape: Shape, classes: int) -> nn.Sequential:
    """Softmax regression: one linear layer on the pixels. 7,850 parameters on 1x28x28."""
    channels, height, width = input_shape
    layer = nn.Linear(channels * height * width, classes)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc=layer))


def mlp(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    hidden: Sequence[int] = (1024, 1024),
    bias: bool = True,
) -> nn.Sequential:
    """PRECODE's perceptron: hidden layers `hidden1`, `hidden2`, ..., then `fc`.

    4,206,602 parameters on 3x32x32 with 10 classes.

    Source: Scheliga, Mäder, Seeland, PRECODE (arXiv 2108.04725), released code.
    """
    channels, height, width = input_shape
    features = channels * height * width
    chain: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, units in enumerate(hidden, start=1):
        chain[f"hidden{number}"] = nn.Linear(features, units, bias=bias)
        chain[f"act{number}"] = activation()
        features = units
    chain["fc"] = nn.Linear(features, classes, bias=bias)
    return nn.Sequential(chain)


def cnn(input_shape: Shape, classes: int, activation: Activation) -> nn.Sequential:
    """The CNN of PPP's authors: unpadded 5x5 convolutions 16, 32, 64 of stride 2, then linear.

    65,962 parameters on 3x32x32 with 10 classes; a picture there ends as 64 features, one position.

    Source: Scheliga, Mäder, Seeland (arXiv 2309.04515), released code; that of their study of
    partial perturbation (arXiv 2208.04767) is not public.
    """
    channels, height, width = input_shape
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for number, filters in enumerate((16, 32, 64), start=1):
        chain[f"conv{number}"] = nn.Conv2d(channels, filters, 5, stride=2)
        chain[f"act{number}"] = activation()
        channels, height, width = filters, (height - 3) // 2, (width - 3) // 2
    chain["flatten"] = nn.Flatten()
    chain["fc"] = nn.Linear(channels * height * width, classes)
    return nn.Sequential(chain)


def convnet(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    width: int = 64,
    norm: str = "batch",
    groups: int = 2,
) -> nn.Sequential:
    """The ConvNet of Inverting Gradients: eight 3x3 convolutions, two poolings, then linear.

    Channels are w, 2w, 2w, 4w, 4w, 4w, pool, 4w, 4w, pool, with w = `width`; each convolution is
    followed by its normalisation and activation. 2,904,970 parameters on 3x32x32 with 10 classes
    and batch normalisation. `norm` is "batch", "group" (with `groups` groups) or "none".

    Source: Geiping et al., Inverting Gradients (arXiv 2003.14053), released code.
    """
    channels, height, breadth = input_shape
    normalisation = _normalisation_layer(norm, groups, known=("batch", "group", "none"))
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for number, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4), start=1):
        chain[f"conv{number}"] = nn.Conv2d(channels, factor * width, 3, padding=1)
        channels = factor * width
        if normalisation is not None:
            chain[f"norm{number}"] = normalisation(channels)
        chain[f"act{number}"] = activation()
        if number in (6, 8):
            chain["pool1" if number == 6 else "pool2"] = nn.MaxPool2d(3)
            height, breadth = height // 3, breadth // 3
    chain["flatten"] = nn.Flatten()
    chain["fc"] = nn.Linear(channels * height * breadth, classes)
    return nn.Sequential(chain)


def resnet18(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    norm: str = "batch",
    groups: int = 2,
    stem: str = "cifar",
) -> nn.Sequential:
    """ResNet-18, by default with the CIFAR stem: a 3x3 convolution of stride 1, no pooling.

    11,173,962 parameters on three channels with 10 classes, 11,172,810 on one. `norm` is "batch"
    or "group" (with `groups` groups; CVB, the successor of PPP, takes 2). stem="imagenet" is
    torchvision's own: a 7x7 convolution of stride 2, then 3x3 max pooling of stride 2 (11,181,642
    parameters); the released code of CVB has that one. The layers carry torchvision's names.

    Their default initialisation is torchvision's: N(0, 2/fan_out) in every convolution, drawn in
    the order of the names after PyTorch's own draw of all layers. I²F's networks come out of it.

    Source: He et al. (arXiv 1512.03385); I²F (arXiv 2309.13016); CVB (arXiv 2309.04515).
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"unknown stem {stem!r}: choose one of cifar, imagenet")
    normalisation = _normalisation_layer(norm, groups, known=("batch", "group"))
    cifar, channels = stem == "cifar", input_shape[0]
    # the meta device draws nothing, so the exchange of the first convolution costs no random number
    with torch.device("meta"):
        network = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes, norm_layer=normalisation)
        network.conv1 = (
            nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            if cifar
            else nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        )
    network.relu = activation()
    for module in network.modules():
        if isinstance(module, BasicBlock):
            module.relu = activation()
    _initialise_resnet(network.to_empty(device="cpu"))
    chain: OrderedDict[str, nn.Module] = OrderedDict(network.named_children())
    if cifar:
        del chain["maxpool"]
    head = chain.pop("fc")
    chain.update(flatten=nn.Flatten(), fc=head)
    return nn.Sequential(chain)


def _initialise_resnet(network: ResNet) -> None:
    # the first pass sets the normalisation and the last layer; for the convolutions it only
    # spends as many random numbers as the construction of a ResNet does
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm)):
            module.reset_parameters()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _normalisation_layer(
    norm: str, groups: int, *, known: tuple[str, ...]
) -> Callable[[int], nn.Module] | None:
    if norm not in known:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(known)}")
    if norm == "group":
        return partial(nn.GroupNorm, groups)
    return nn.BatchNorm2d if norm == "batch" else None
