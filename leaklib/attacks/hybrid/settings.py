"""How the layer-wise hybrid attack corrects what a linear system gave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Correction:
    """Weights and budget of one layer's correction by gradient matching.

        J(x) = w_cos Σ_θ [1 − cos(∇_θ ℓ(f_{i..}(x), y), g_θ)] + w_tv TV(x) + w_sys ‖U x − v‖²

    Args:
        cosine: w_cos, over the parameter tensors of this layer and those behind it.
        tv: w_tv, weight of the total variation, of hidden maps too.
        system: w_sys, weight of the layer's own unscaled equations.
        steps: steps of Adam.
    """

    cosine: float
    tv: float
    system: float
    steps: int

    def __post_init__(self) -> None:
        if min(self.cosine, self.tv, self.system) < 0 or self.steps < 0:
            raise ValueError(f"expected weights >= 0 and steps >= 0, got {self}")


# For the convolution next to the image, the one behind it, and all others.
PUBLISHED = (
    Correction(1.0, 1.0, 0.05, 10_000),
    Correction(1.0, 1.0, 0.1, 8_000),
    Correction(10.0, 0.1, 1.0, 1_000),
)


def correction_of(corrections: tuple[Correction, ...], place: int) -> Correction:
    """The correction of the convolution at `place`, counted from the image; the last one repeats.

    >>> correction_of(PUBLISHED, 5).steps
    1000
    """
    if not corrections:
        raise ValueError("expected at least one correction, got none; steps=0 leaves a layer alone")
    return corrections[min(place, len(corrections) - 1)]
