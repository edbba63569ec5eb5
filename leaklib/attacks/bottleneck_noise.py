"""The noise of a bottleneck, read off the gradients that it is meant to protect.

Encoder and decoder of a fully connected bottleneck are linear layers with a bias. One picture's
gradient of each is [output gradient] x [input | 1], so one division gives the input: h of the
encoder, the code b = μ + ε ⊙ σ of the decoder. μ and σ follow from h, and so does the noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaklib.attacks.analytic import invert_linear
from leaklib.attacks.feature_inversion import encoder_features
from leaklib.defenses.bottleneck import VariationalBottleneck
from leaklib.defenses.layer_order import bottleneck_parts
from leaklib.gradients.payload import SharedGradient
from leaklib.gradients.stochastic import Noise


def recover_noise(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    bottleneck: str | None = None,
) -> Noise:
    """The victim's own noise, ε = (b − μ(h)) / σ(h), exact up to rounding.

    With it the "stochastic" gradients are deterministic functions of the picture, and a search,
    `invert_gradients(..., noise=recover_noise(...))`, may match any of them. All together, the
    gradients behind can drown those before the bottleneck: `match_known_noise` weighs them.

    Args:
        model: the shared model, with a fully connected bottleneck of ours.
        shared: the released gradients, batch 1, with those of encoder and decoder as the client
            computed them: partial perturbation leaves both alone.
        image_shape: (channels, height, width), or the shape of another input.
        bottleneck: its name, where the model has several.

    Returns:
        Buffer name -> (victims, 1, 1, K), as `draw_noise(..., clients=victims)` gives it.

    Raises:
        ValueError: as `encoder_features`; a decoder that was not shared, one whose bias gradient is
            zero, or a width σ that underflows.

    Cost: two divisions. Source: ours.
    """
    features = encoder_features(model, shared, image_shape=image_shape, bottleneck=bottleneck)
    parts = bottleneck_parts(model, image_shape, bottleneck=bottleneck)
    name = parts.encoder[0].removesuffix(".encoder.weight")
    layer = model.get_submodule(name)
    assert isinstance(layer, VariationalBottleneck)
    weight, bias = f"{name}.decoder.weight", f"{name}.decoder.bias"
    if weight not in shared.tensors or bias not in shared.tensors:
        raise ValueError(
            f"expected the gradients {weight!r} and {bias!r}, got {', '.join(shared.names)}; "
            "without them use ignore_stochastic"
        )
    code = invert_linear(shared.tensors[weight], shared.tensors[bias])
    if not torch.isfinite(code).all():
        victim = int((~torch.isfinite(code).all(1)).nonzero()[0])
        raise ValueError(
            f"expected a gradient of {bias!r} that is not zero, got zero for victim {victim}; "
            "use ignore_stochastic"
        )
    mean, spread = _encode(layer, features)
    noise = (code - mean) / F.softplus(spread)
    if not torch.isfinite(noise).all():
        victim = int((~torch.isfinite(noise).all(1)).nonzero()[0])
        raise ValueError(
            f"expected widths σ above 0, got one that underflows for victim {victim}; "
            "use ignore_stochastic"
        )
    return {f"{name}.noise": noise.to(shared.dtype)[:, None, None]}


def _encode(layer: VariationalBottleneck, features: Tensor) -> tuple[Tensor, Tensor]:
    """μ and s of the features, in their precision."""
    weight, bias = layer.encoder.weight.detach(), layer.encoder.bias.detach()
    mean, spread = F.linear(features, weight.to(features), bias.to(features)).chunk(2, dim=1)
    return mean, spread
