"""The convolution in front of a layer, reached through invertible activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.chain import ConvStage, ElementwiseStage, Stage


@dataclass(frozen=True)
class Upstream:
    """The convolution in front of a layer, and the activations between them, in order."""

    conv: ConvStage
    between: tuple[ElementwiseStage, ...]

    def preactivation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W_{i−1}x_{i−1} from x_i, without the bias, and the derivative of that map."""
        stretch = torch.ones_like(x)
        for stage in reversed(self.between):
            stretch = stretch / stage.inverse.slope(x)
            x = stage.inverse.preactivation(x)
        bias = self.conv.bias
        return (x if bias is None else x - bias.view(-1, 1, 1)), stretch


def upstream_of(stages: tuple[Stage, ...], index: int) -> Upstream | None:
    """The convolution before stage `index`, None where activations hide it or there is none."""
    between: list[ElementwiseStage] = []
    for stage in reversed(stages[:index]):
        if isinstance(stage, ConvStage):
            return Upstream(stage, tuple(reversed(between)))
        if not isinstance(stage, ElementwiseStage) or stage.inverse.known is not None:
            return None
        between.append(stage)
    return None
