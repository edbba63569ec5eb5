"""The stages of a network that is a chain: what each does to its input, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from leaklib.chain.inverses import Inverse
from leaklib.layer_system.geometry import Geometry

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ConvStage:
    """z = W x + b for images.

    Args:
        name: module path, such as "conv1".
        geometry: sizes.
        weight: (filters, channels per group, kernel height, kernel width), float64.
        bias: (filters,) or None.
    """

    name: str
    geometry: Geometry
    weight: Tensor
    bias: Tensor | None

    @property
    def input_shape(self) -> Shape:
        """(channels, height, width)."""
        return self.geometry.input_shape

    @property
    def output_shape(self) -> Shape:
        """(filters, height, width)."""
        return self.geometry.output_shape

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (rows, *input shape)."""
        g = self.geometry
        return F.conv2d(x, self.weight, self.bias, g.stride, g.padding, g.dilation, g.groups)


@dataclass(frozen=True)
class LinearStage:
    """z = W x + b for vectors; weight (outputs, inputs) in float64, bias (outputs,) or None."""

    name: str
    weight: Tensor
    bias: Tensor | None

    @property
    def input_shape(self) -> Shape:
        """(inputs,)."""
        return (self.weight.shape[1],)

    @property
    def output_shape(self) -> Shape:
        """(outputs,)."""
        return (self.weight.shape[0],)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (rows, inputs)."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class PoolStage:
    """Average pooling: linear, without parameters; `pool` maps (rows, *input shape)."""

    name: str
    pool: Callable[[Tensor], Tensor]
    input_shape: Shape
    output_shape: Shape

    def forward(self, x: Tensor) -> Tensor:
        """Apply the pooling."""
        return self.pool(x)

    def transposed(self, y: Tensor) -> Tensor:
        """The adjoint of the pooling."""
        _, pull = vjp(self.pool, y.new_zeros(len(y), *self.input_shape))  # type: ignore[misc]
        return pull(y)[0]


@dataclass(frozen=True)
class ElementwiseStage:
    """An activation or a normalisation with known statistics."""

    name: str
    inverse: Inverse
    input_shape: Shape

    @property
    def output_shape(self) -> Shape:
        """The shape stays."""
        return self.input_shape

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map."""
        return self.inverse.forward(x)


@dataclass(frozen=True)
class ReshapeStage:
    """Flattening."""

    name: str
    input_shape: Shape
    output_shape: Shape

    def forward(self, x: Tensor) -> Tensor:
        """Reshape (rows, *input shape)."""
        return x.reshape(len(x), *self.output_shape)


@dataclass(frozen=True)
class ResidualStage:
    """s = W₂ σ(W₁ x + b₁) + b₂ + h(x), without the activation behind it.

    Args:
        name: module path.
        first: W₁.
        activation: σ.
        second: W₂.
        shortcut: h as a 1x1 convolution, or None for the identity.
    """

    name: str
    first: ConvStage
    activation: ElementwiseStage
    second: ConvStage
    shortcut: ConvStage | None

    @property
    def input_shape(self) -> Shape:
        """(channels, height, width)."""
        return self.first.input_shape

    @property
    def output_shape(self) -> Shape:
        """(filters, height, width)."""
        return self.second.output_shape

    def forward(self, x: Tensor) -> Tensor:
        """Apply both branches."""
        body = self.second.forward(self.activation.forward(self.first.forward(x)))
        return body + (x if self.shortcut is None else self.shortcut.forward(x))


Stage = ConvStage | LinearStage | PoolStage | ElementwiseStage | ReshapeStage | ResidualStage
