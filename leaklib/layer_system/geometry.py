"""The shape of a convolution: what a layer is, before any picture or gradient is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Sizes of one convolution; a fully connected layer is one whose kernel covers its input.

    Output row o and tap t meet input row o·stride + t·dilation − padding; columns likewise.

    Args:
        input_shape: (channels, height, width).
        filters: output channels.
        kernel: (height, width).
        stride: (rows, columns).
        padding: zeros at each side, (rows, columns).
        dilation: distance of two taps, (rows, columns).
        groups: channels and filters fall into as many groups that do not meet.
    """

    input_shape: tuple[int, int, int]
    filters: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        channels = self.input_shape[0]
        if self.groups < 1 or channels % self.groups or self.filters % self.groups:
            raise ValueError(
                f"expected groups that divide {channels} channels and {self.filters} filters, got "
                f"{self.groups}"
            )
        positive = (*self.input_shape, self.filters, *self.kernel, *self.stride, *self.dilation)
        if min(positive) < 1 or min(self.padding) < 0:
            raise ValueError(f"expected sizes >= 1 and padding >= 0, got {self}")
        if min(self.output_size) < 1:
            raise ValueError(
                f"expected a kernel no larger than the padded input, got {self}; add padding"
            )

    @property
    def output_size(self) -> Pair:
        """(height, width) of the output."""
        height, width = (
            (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for size, taps, stride, padding, dilation in zip(
                self.input_shape[1:], self.kernel, self.stride, self.padding, self.dilation,
                strict=True,
            )
        )  # fmt: skip
        return height, width

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(filters, height, width)."""
        return (self.filters, *self.output_size)

    @property
    def positions(self) -> int:
        """Places of the kernel: height times width of the output."""
        height, width = self.output_size
        return height * width

    @property
    def unknowns(self) -> int:
        """Entries of the input, n."""
        channels, height, width = self.input_shape
        return channels * height * width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(filters, channels per group, kernel height, kernel width)."""
        return (self.filters, self.input_shape[0] // self.groups, *self.kernel)


def conv_geometry(module: nn.Conv2d, input_shape: Sequence[int]) -> Geometry:
    """Geometry of a module for inputs of one shape.

    Raises:
        ValueError: padding that is not of zeros, or not the same on both sides.
    """
    if module.padding_mode != "zeros":
        raise ValueError(
            f"expected zero padding, got padding_mode={module.padding_mode!r}: its border rows "
            "repeat pixels, which these equations leave out"
        )
    kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
    if module.padding == "valid":
        padding: Pair = (0, 0)
    elif module.padding == "same":
        reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        if any(r % 2 for r in reach):
            raise ValueError(
                f"expected padding equal on both sides, got 'same' with kernel {kernel} and "
                f"dilation {dilation}; use an odd kernel"
            )
        padding = (reach[0] // 2, reach[1] // 2)
    else:
        assert not isinstance(module.padding, str)
        padding = _pair(module.padding)
    channels, height, width = input_shape
    return Geometry(
        (channels, height, width), module.out_channels, kernel, _pair(module.stride), padding,
        dilation, module.groups,
    )  # fmt: skip


def unfold(geometry: Geometry, images: Tensor) -> Tensor:
    """What each place of the kernel sees: (rows, groups, channels·taps per group, positions)."""
    columns = F.unfold(
        images, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride
    )
    return columns.unflatten(1, (geometry.groups, -1))


def fold(geometry: Geometry, columns: Tensor) -> Tensor:
    """The adjoint of `unfold`: adds up what falls on a pixel, (rows, channels, height, width)."""
    return F.fold(
        columns.flatten(1, 2), geometry.input_shape[1:], geometry.kernel, geometry.dilation,
        geometry.padding, geometry.stride,
    )  # fmt: skip


def _pair(value: int | Sequence[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
