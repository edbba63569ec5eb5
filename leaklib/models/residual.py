"""A residual block written plainly, for the study of what a skip connection hands over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from leaklib.models.initialisation import Activation
from leaklib.models.networks import Shape


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection, an activation behind each sum.

        a = σ(W₁ x + b₁),   s = W₂ a + b₂ + h(x),   output σ(s)

    h is the identity where x and s have one shape, else a 1x1 convolution. With `skip=False` there
    is no h: `shortcut` is None and s = W₂ a + b₂; the other parameters keep their names.

    Source: He et al. (arXiv 1512.03385), Fig. 2, with σ for ReLU and no normalisation.

    Args:
        channels: of the input.
        filters: channels of the output.
        activation: makes one activation module.
        stride: of the first convolution and of the shortcut.
        skip: False cuts the skip connection.
        bias: of all convolutions.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        activation: Activation,
        *,
        stride: int = 1,
        skip: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=bias)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=bias)
        self.act2 = activation()
        self.shortcut: nn.Module | None = None
        if skip and stride == 1 and channels == filters:
            self.shortcut = nn.Identity()
        elif skip:
            self.shortcut = nn.Conv2d(channels, filters, 1, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(images, channels, height, width)` to `(images, filters, ...)`."""
        s = self.conv2(self.act1(self.conv1(x)))
        if self.shortcut is not None:
            s = s + self.shortcut(x)
        return self.act2(s)


def resnet_small(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    blocks: int = 2,
    width: int = 16,
    halve: Sequence[int] = (),
    skip: bool = True,
    bias: bool = False,
) -> nn.Sequential:
    """A small residual network with invertible activations: 3x3 convolution, blocks, linear.

    Layers conv1, act1, block1, block2, ..., flatten, fc. No normalisation and no pooling, so every
    step can be inverted where its layer has full rank. Where all shortcuts are identities,
    `skip=False` changes no weight.

    Args:
        input_shape: channels, height, width.
        classes: outputs of `fc`.
        activation: makes one activation module.
        blocks: number of residual blocks.
        width: filters of conv1.
        halve: numbers of the blocks, from 1, that halve the picture and double the channels.
        skip: False cuts every skip connection.
        bias: in all layers.

    Returns:
        The network.

    Raises:
        ValueError: blocks or width below 1, or `halve` names a block that is not there.

    Source: He et al. (arXiv 1512.03385), section 3.3, reduced.
    """
    if blocks < 1 or width < 1:
        raise ValueError(f"expected blocks >= 1 and width >= 1, got {blocks} and {width}")
    if not set(halve) <= set(range(1, blocks + 1)):
        raise ValueError(f"halve: expected block numbers from 1 to {blocks}, got {tuple(halve)}")
    channels, rows, columns = input_shape
    network: OrderedDict[str, nn.Module] = OrderedDict()
    network["conv1"] = nn.Conv2d(channels, width, 3, padding=1, bias=bias)
    network["act1"] = activation()
    channels = width
    for number in range(1, blocks + 1):
        stride = 2 if number in halve else 1
        network[f"block{number}"] = ResidualBlock(
            channels, stride * channels, activation, stride=stride, skip=skip, bias=bias
        )
        channels *= stride
        # padding keeps the size, so only the stride shrinks it
        rows, columns = -(-rows // stride), -(-columns // stride)
    network["flatten"] = nn.Flatten()
    network["fc"] = nn.Linear(channels * rows * columns, classes, bias=bias)
    return nn.Sequential(network)
