"""The attack that knows a bottleneck's noise, and ignores nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from leaklib.attacks.adam import AdamSettings
from leaklib.attacks.bottleneck_noise import recover_noise
from leaklib.attacks.ignore import DIA_STEPS
from leaklib.attacks.matching import invert_gradients
from leaklib.attacks.matching_settings import Matching
from leaklib.attacks.reconstruction import Reconstruction
from leaklib.defenses.layer_order import bottleneck_parts
from leaklib.gradients.payload import SharedGradient


def match_known_noise(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    generator: torch.Generator,
    bottleneck: str | None = None,
    labels: Tensor | None = None,
    matching: Matching | None = None,
    optimiser: AdamSettings | None = None,
    **settings: Any,
) -> Reconstruction:
    """Read the noise off the bottleneck, then match all gradients: min 1 − cos_w + α TV(x).

    cos_w is the cosine between ∇L(x, y, ε) and ĝ with the victim's own ε (`recover_noise`). The
    layers before the bottleneck, which partial perturbation changes, weigh 1. All others go out
    exact and weigh w = Σ‖ĝ_before‖² / Σ‖ĝ_others‖², so that both groups are equally long: a
    bottleneck shrinks the gradients before it, and the exact ones would drown them; strong noise
    would drown the exact ones. The sums run over all victims, so w is one number for a call.

    Cost: as `invert_gradients`. Source: ours.

    Args:
        model: the shared model, with a fully connected bottleneck of ours.
        shared: the released gradients, batch 1, those of encoder and decoder unperturbed.
        image_shape: (channels, height, width) of one private image, or the shape of another input.
        generator: draws the starts.
        bottleneck: its name, where the model has several.
        labels: as in `invert_gradients`.
        matching: distance and priors; it names neither layers nor weights, both are set here. None
            is cosine with TV weight 1e-5. Where layers were pruned, `support` gains much.
        optimiser: None is `DIA_STEPS`, as in `ignore_stochastic`.
        **settings: further ones of `invert_gradients`, such as max_evaluations and restarts.

    Returns:
        Reconstruction.

    Raises:
        ValueError: as `recover_noise`, so where the exact gradients are zero, and
            `invert_gradients`; a matching with layers or weights.
    """
    matching = matching or Matching("cosine", tv_weight=1e-5)
    if matching.layers is not None or matching.layer_weights is not None:
        raise ValueError(
            "expected a matching without layers and layer_weights, which are set here, got "
            f"{matching}; to choose them call invert_gradients(noise=recover_noise(...))"
        )
    noise = recover_noise(model, shared, image_shape=image_shape, bottleneck=bottleneck)
    before = bottleneck_parts(model, image_shape, bottleneck=bottleneck).before
    energy = {n: float(t.double().square().sum()) for n, t in shared.items()}
    changed = sum(energy[n] for n in energy if n in before)
    exact = sum(energy[n] for n in energy if n not in before)  # recover_noise refuses zeros there
    if changed:
        weights = {n: changed / exact for n in energy if n not in before}
        matching = replace(matching, layer_weights=weights)
    return invert_gradients(
        model, shared, image_shape=image_shape, generator=generator, labels=labels,
        matching=matching, optimiser=optimiser or DIA_STEPS, noise=noise, **settings,
    )  # fmt: skip
