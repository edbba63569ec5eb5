"""The attack that ignores what a bottleneck made stochastic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from leaklib.attacks.adam import AdamSettings
from leaklib.attacks.matching import invert_gradients
from leaklib.attacks.matching_settings import Matching
from leaklib.attacks.reconstruction import Reconstruction
from leaklib.defenses.layer_order import Preset, attack_layers
from leaklib.gradients.payload import SharedGradient

# Steps of the released codes, all signed Adam: of PRECODE (with TV weight 1e-6 and without the
# divergence), of the dropout-inversion attack (TV 1e-5), by the authors of PPP and of its month,
# and of the convolutional bottleneck (TV 0.1 for convolutions, 1e-4 for the transformer).
PRECODE_STEPS = AdamSettings(lr=0.01, steps=7_000)
DIA_STEPS = AdamSettings(
    lr=0.1, steps=20_000, milestones=(), patience=800, stop_after=4_000, stop_below=1e-5
)
CVB_STEPS = replace(DIA_STEPS, lr=1.0, patience=400)


def ignore_stochastic(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    generator: torch.Generator,
    preset: Preset = "ignore_bottleneck_and_after",
    bottleneck: str | None = None,
    labels: Tensor | None = None,
    matching: Matching | None = None,
    optimiser: AdamSettings | None = None,
    **settings: Any,
) -> Reconstruction:
    """Inverting gradients on the layers S that the noise leaves alone: min 1 − cos_S + α TV(x).

    cos_S is the cosine between ∇L(x, y, ε) and ĝ where inner product and both norms run over S
    only; ε is fresh at every evaluation. Against `partial_perturbation` the same attack meets the
    perturbed layers alone.

    Cost: as `invert_gradients`.
    Source: arXiv 2208.04767 (abstract); steps, cost and the preset "ignore_decoder_and_after" as in
    the released codes of arXiv 2208.06163 and 2309.04515. That the whole bottleneck is dropped is
    our reading.

    Args:
        model: the shared model, with a bottleneck.
        shared: the released gradients.
        image_shape: (channels, height, width) of one private image, or the shape of another input.
        generator: draws the starts and the attacker's noise.
        preset: S, see `leaklib.defenses.attack_layers`; "all" is the attack that PRECODE stops.
        bottleneck: its name, where the model has several.
        labels: as in `invert_gradients`.
        matching: distance and priors; its layers are replaced by S. None is cosine with TV weight
            1e-5.
        optimiser: None is `DIA_STEPS`; `PRECODE_STEPS` and `CVB_STEPS` are there too.
        **settings: further ones of `invert_gradients`, such as max_evaluations and restarts.

    Returns:
        Reconstruction.

    Raises:
        ValueError: as `invert_gradients`; no bottleneck, or no shared layer in S.
    """
    names = attack_layers(model, preset, image_shape, bottleneck=bottleneck)
    layers = tuple(n for n in shared.names if n in names)
    if not layers:
        raise ValueError(
            f"expected some of {', '.join(names)} among the shared layers, got "
            f"{', '.join(shared.names)}; choose another preset"
        )
    matching = replace(matching or Matching("cosine", tv_weight=1e-5), layers=layers)
    return invert_gradients(
        model, shared, image_shape=image_shape, generator=generator, labels=labels,
        matching=matching, optimiser=optimiser or DIA_STEPS, **settings,
    )  # fmt: skip
