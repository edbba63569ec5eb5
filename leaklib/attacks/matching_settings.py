"""What a matching attack compares, and what it believes of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leaklib.attacks.distances import DISTANCES


@dataclass(frozen=True)
class Matching:
    """What the attacker compares, and what it believes of pictures.

    Args:
        distance: "l2", "cosine" or "layer_cosine".
        layers: layers to compare; None compares all that were shared. Dropping a layer from
            gradient and target alike is a layer mask.
        layer_weights: layer -> weight in the distance; layers not named weigh 1.
        tv_weight: α_tv, weight of the total variation.
        bn_weight: α_bn, weight of the BatchNorm-statistics prior.
        support: compare only the entries that the release did not set to zero, for each victim its
            own: against pruning, which the attacker sees. It is no gain by itself: that an entry
            was pruned says that it is small, which this gives away.
        extra_losses: the dummy loss contains what the model's layers add to it, as the client's
            does (a bottleneck's divergence). PRECODE's published attack leaves it out.
        score_noises: for a stochastic model, the final objective is the mean over this many fresh
            noises; 0 keeps the lowest single value, which luck has a part in.
    """

    distance: str = "l2"
    layers: tuple[str, ...] | None = None
    layer_weights: Mapping[str, float] | None = None
    tv_weight: float = 0.0
    bn_weight: float = 0.0
    support: bool = False
    extra_losses: bool = True
    score_noises: int = 8

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise ValueError(
                f"expected a distance among {', '.join(DISTANCES)}, got {self.distance!r}"
            )
        if min(self.tv_weight, self.bn_weight) < 0:
            raise ValueError(
                f"expected tv_weight >= 0 and bn_weight >= 0, got {self.tv_weight}, "
                f"{self.bn_weight}"
            )
        if self.score_noises < 0:
            raise ValueError(f"expected score_noises >= 0, got {self.score_noises}")
