"""A small vision transformer: patches as tokens, the class read off a token of its own.

It is a chain of named layers like the other networks, so whatever goes in front of `fc` finds one
vector a picture. Its blocks are those of `leaklib.models.transformer`.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from leaklib.models.initialisation import Activation
from leaklib.models.networks import Shape
from leaklib.models.transformer import Block


class Tokens(nn.Module):
    """A map of features to tokens: positions in reading order, behind a learned class token.

    Class token and positions start as N(0, 1).

    Args:
        patches: positions of the map.
        dim: features.
    """

    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(dim))
        self.positions = nn.Parameter(torch.randn(patches + 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(images, dim, height, width)` to `(images, 1 + height · width, dim)`."""
        tokens = x.flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(x), 1, -1)
        return torch.cat([first, tokens], 1) + self.positions


class FirstToken(nn.Module):
    """The class token alone: `(images, tokens, dim)` to `(images, dim)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop the other tokens."""
        return x[:, 0]


def vit(
    input_shape: Shape,
    classes: int,
    activation: Activation,
    *,
    patch: int = 4,
    dim: int = 256,
    layers: int = 4,
    heads: int = 16,
    hidden: int = 256,
    bias: bool = False,
) -> nn.Sequential:
    """The transformer of PPP's authors: 4x4 patches, 4 pre-norm blocks of width 256.

    1,609,216 parameters on 3x32x32 with 10 classes. `bias` is that of every linear map; the layer
    norms keep their shift. The released code has its activation behind both linear maps of a
    block's network; here, as usual, it stands between them.

    Source: Scheliga, Mäder, Seeland (arXiv 2208.06163 and 2309.04515), released code.
    """
    channels, height, width = input_shape
    if min(patch, dim, layers, heads, hidden) < 1 or dim % heads:
        raise ValueError(
            "expected patch, dim, layers, heads, hidden >= 1 and heads dividing dim, got "
            f"patch={patch}, dim={dim}, layers={layers}, heads={heads}, hidden={hidden}"
        )
    if height % patch or width % patch:
        raise ValueError(
            f"expected images that patches of {patch}x{patch} tile, got {height}x{width}; resize "
            "them (load_images has size=...) or choose another patch"
        )
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    # a linear map of each patch
    chain["patches"] = nn.Conv2d(channels, dim, patch, stride=patch, bias=bias)
    chain["tokens"] = Tokens((height // patch) * (width // patch), dim)
    for number in range(1, layers + 1):
        chain[f"block{number}"] = Block(
            dim, heads, hidden, activation(), "pre", causal=False, bias=bias, eps=1e-6
        )
    chain["norm"] = nn.LayerNorm(dim, eps=1e-6)
    chain["first"] = FirstToken()
    chain["fc"] = nn.Linear(dim, classes, bias=bias)
    return nn.Sequential(chain)
