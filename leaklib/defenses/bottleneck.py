"""PRECODE's variational bottleneck: a layer whose random code makes gradients stochastic.

    (μ, s) = encoder(h),   σ = softplus(s),   b = μ + ε ⊙ σ, ε ~ N(0, I),   out = decoder(b)

and the loss gains β · KL(N(μ, σ²) ‖ N(0, I)). h is what enters the layer behind it. The noise ε is
an input, see `leaklib.gradients.stochastic`; `leaklib.defenses.insert_bottleneck` puts the layer
into a model.

Symbols: μ = mean, σ = deviation, ε = noise, β = kl_weight, K = width.
Source: Scheliga, Mäder & Seeland, PRECODE (arXiv 2108.04725), released code; the convolutional form
from their arXiv 2309.04515, released code.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from leaklib.gradients.stochastic import Sampling, StochasticLayer, collecting, report_loss

KL = Literal["bits", "nats", "cvb"]
KLS: tuple[KL, ...] = get_args(KL)

# Below this, ln softplus(s) is s to the last digit of float64, and softplus itself soon 0.
_LINEAR = -40.0


def kl_divergence(mean: Tensor, spread: Tensor, *, unit: KL = "bits") -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) of every entry: ½ (μ² + σ² − 1) − ln σ, σ = softplus(s).

    Args:
        mean: μ.
        spread: s, of the same shape.
        unit: "bits" (divided by ln 2, as PRECODE has it), "nats", or "cvb": the released code of
            the convolutional form, −½ (1 + σ − μ² − e^σ), which takes σ for a log-variance and so
            is not the divergence of what is sampled.

    Returns:
        Of the same shape.

    Zero where the code is standard normal, softplus(ln(e − 1)) = 1:

    >>> import torch
    >>> s = torch.tensor(math.e - 1).log()
    >>> bool(kl_divergence(torch.tensor(0.0), s).abs() < 1e-6)
    True
    """
    deviation = F.softplus(spread)
    if unit == "cvb":
        return 0.5 * (mean.square() + deviation.exp() - 1 - deviation)
    bounded = spread.clamp_min(_LINEAR)
    log_deviation = F.softplus(bounded).log() + (spread - bounded)
    nats = 0.5 * (mean.square() + deviation.square() - 1) - log_deviation
    return nats / math.log(2) if unit == "bits" else nats


class VariationalBottleneck(StochasticLayer):
    """PRECODE's bottleneck: fully connected encoder and decoder around K random numbers.

    Features of any shape are flattened, and the decoder's output has their shape again. The term
    of the loss is β Σ_k KL_k per input; its mean over the batch is the published one.

    Args:
        feature_shape: shape of one input's features, without the batch axis.
        width: K.
        kl_weight: β >= 0.
        kl: unit of the divergence, see `kl_divergence`.
        sampling: "always" as published, where eval() does not switch the noise off, or "training":
            in eval mode the code is its mean, b = μ.

    Raises:
        ValueError: a setting out of range.

    >>> import torch
    >>> VariationalBottleneck((3, 4, 4), width=8)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self,
        feature_shape: tuple[int, ...],
        *,
        width: int = 256,
        kl_weight: float = 1e-3,
        kl: KL = "bits",
        sampling: Sampling = "always",
    ) -> None:
        super().__init__(sampling)
        _check_settings(width, kl_weight, kl)
        self.feature_shape, self.width = tuple(feature_shape), width
        self.kl_weight, self.kl = kl_weight, kl
        size = math.prod(self.feature_shape)
        self.encoder = nn.Linear(size, 2 * width)
        self.decoder = nn.Linear(width, size)

    def noise_shape(self, batch: int) -> tuple[int, ...]:
        """(batch, K)."""
        return (batch, self.width)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, *feature_shape) to the same shape."""
        _check_features(features, self.feature_shape)
        mean, spread = self.encoder(features.flatten(1)).chunk(2, dim=1)  # (batch, K) each
        return self.decoder(_code(self, mean, spread)).view_as(features)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return _settings(self)


class ConvolutionalBottleneck(StochasticLayer):
    """The convolutional form (CVB): K random maps in place of K random numbers.

    Encoder: a convolution without bias to 2K maps that keeps height and width; s is clipped to
    [−5, 5]. Decoder: a 1x1 convolution without bias. The published encoder is two convolutions of K
    maps each, here the two halves of one: the same function, and the same default start. Features
    (tokens, dim) of a transformer are seen as `tokens` maps of √dim x √dim, as published.

    The term of the loss is β times the divergence summed over the K maps and averaged over their
    positions. kl="cvb" is the released formula.

    Args:
        feature_shape: (channels, height, width) or (tokens, dim), dim a square.
        width: K; None is half the channels, and 8 below 8 channels.
        kernel: side of the encoder's kernel, odd; 5 as published for networks of convolutions and
            3 for the transformer.
        kl_weight: β >= 0; published 0.1 (small network and transformer) and 5e-5 (ResNet).
        kl: see `kl_divergence`.
        sampling: as in `VariationalBottleneck`.

    Raises:
        ValueError: a setting out of range, or features that are no maps.

    >>> import torch
    >>> ConvolutionalBottleneck((16, 6, 6))(torch.ones(2, 16, 6, 6)).shape
    torch.Size([2, 16, 6, 6])
    """

    def __init__(
        self,
        feature_shape: tuple[int, ...],
        *,
        width: int | None = None,
        kernel: int = 5,
        kl_weight: float = 0.1,
        kl: KL = "nats",
        sampling: Sampling = "always",
    ) -> None:
        super().__init__(sampling)
        self.feature_shape = tuple(feature_shape)
        channels, *self.map_shape = _as_maps(self.feature_shape)
        self.width = width if width is not None else (channels // 2 if channels >= 8 else 8)
        _check_settings(self.width, kl_weight, kl)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"expected an odd kernel >= 1, which keeps the size, got {kernel}")
        self.kl_weight, self.kl = kl_weight, kl
        self.encoder = nn.Conv2d(channels, 2 * self.width, kernel, padding="same", bias=False)
        self.decoder = nn.Conv2d(self.width, channels, 1, bias=False)

    def noise_shape(self, batch: int) -> tuple[int, ...]:
        """(batch, K, height, width)."""
        return (batch, self.width, *self.map_shape)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, *feature_shape) to the same shape."""
        _check_features(features, self.feature_shape)
        maps = features.reshape(len(features), -1, *self.map_shape)
        mean, spread = self.encoder(maps).chunk(2, dim=1)  # (batch, K, height, width) each
        code = _code(self, mean, spread.clamp(-5, 5), positions=math.prod(self.map_shape))
        return self.decoder(code).reshape(features.shape)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return _settings(self)


Bottleneck = VariationalBottleneck | ConvolutionalBottleneck


def _code(layer: Bottleneck, mean: Tensor, spread: Tensor, *, positions: int = 1) -> Tensor:
    """B = μ + ε ⊙ softplus(s), and β · KL per input reported where somebody collects it."""
    if collecting():
        divergence = kl_divergence(mean, spread, unit=layer.kl).flatten(1).sum(1) / positions
        report_loss(layer.kl_weight * divergence)
    if not layer.draws:
        return mean
    return mean + layer.current_noise(mean) * F.softplus(spread)


def _check_settings(width: int, kl_weight: float, kl: str) -> None:
    if width < 1 or not 0 <= kl_weight < math.inf:
        raise ValueError(
            f"expected width >= 1 and a finite kl_weight >= 0, got width={width}, "
            f"kl_weight={kl_weight}"
        )
    if kl not in KLS:
        raise ValueError(f"expected kl among {', '.join(KLS)}, got {kl!r}")


def _check_features(features: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(features.shape[1:]) != shape:
        raise ValueError(
            f"expected features (batch, {', '.join(map(str, shape))}), got "
            f"{tuple(features.shape)}; insert the bottleneck anew for inputs of another size"
        )


def _as_maps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(channels, height, width) of the features; tokens are channels."""
    side = math.isqrt(shape[-1]) if shape else 0
    if len(shape) == 2 and side * side == shape[1]:
        return (shape[0], side, side)
    if len(shape) != 3:
        raise ValueError(
            "expected features (channels, height, width), or (tokens, dim) with dim a square, got "
            f"{shape}; use kind='vb'"
        )
    return shape


def _settings(layer: Bottleneck) -> str:
    return (
        f"features={layer.feature_shape}, width={layer.width}, kl_weight={layer.kl_weight}, "
        f"kl={layer.kl!r}, sampling={layer.sampling!r}"
    )
