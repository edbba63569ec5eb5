"""What the recursive attack returns: pictures, and a report of every layer it went through."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from leaklib.attacks.reconstruction import Reconstruction


@dataclass(frozen=True)
class LayerReport:
    """One layer of a recursive attack, seen by the attacker alone.

    Args:
        name: module path.
        unknowns: entries of the layer's input, n.
        rank: of its equations for generic values, by counting; an upper bound behind a ReLU; None
            where no formula is known.
        residual: ‖U x − b‖/‖b‖ of its balanced equations (victims,).
        condition: σ_max/σ_min of the system that was solved (victims,); NaN where not computed.
        sign_flips: entries of the layer's output whose side of the activation's kink differs
            between the recursion and a forward pass of the picture found (victims,).
        steps: Levenberg-Marquardt steps of the hybrid, 0 where it was not used (victims,).
    """

    name: str
    unknowns: int
    rank: int | None
    residual: Tensor
    condition: Tensor
    sign_flips: Tensor
    steps: Tensor

    @property
    def deficit(self) -> int | None:
        """Rank − n, at most 0; None where the rank is not known."""
        return None if self.rank is None else self.rank - self.unknowns


@dataclass(frozen=True)
class RecursiveReconstruction(Reconstruction):
    """A reconstruction by recursion; `objective` is the largest residual of a layer.

    Args:
        layers: reports from the image to the output.
        margins: chosen root μ (victims,); NaN with more than one logit.
        margin_roots: all roots (victims, 2), NaN where there is none.
        twins: the picture of the other root (victims, 1, channels, height, width): in a network
            without biases its gradient is the same. NaN where there is no second root. Where both
            fit into [0, 1] the darker one is the answer and the brighter one stands here; the
            gradient cannot tell, and in trained networks the private one is mostly the brighter.
        inputs: layer -> its input as the recursion held it (victims, *shape), float64, from the
            image to the output; None unless kept on request.
    """

    layers: tuple[LayerReport, ...] = ()
    margins: Tensor | None = None
    margin_roots: Tensor | None = None
    twins: Tensor | None = None
    inputs: dict[str, Tensor] | None = None

    def first_wrong_layer(self, *, tolerance: float = 1e-3) -> list[str | None]:
        """The layer nearest the output with a deficit or a residual above the tolerance.

        None for a victim whose layers are all sound. A residual that is NaN counts as wrong. A
        deficient layer answers without any residual and its error shows one layer on, so the
        deficit counts as wrong, unless the hybrid filled it. Sign flips do not count: they come
        from a forward pass of the picture, which one wrong layer upsets in all layers behind it.
        """
        victims = len(self.images)
        names: list[str | None] = [None] * victims
        for layer in self.layers:  # later entries are nearer the output and overwrite
            short = (layer.deficit or 0) < 0
            wrong = ~(layer.residual <= tolerance) | ((layer.steps == 0) & short)
            for victim in wrong.nonzero()[:, 0].tolist():
                names[victim] = layer.name
        return names

    def table(self) -> pd.DataFrame:
        """One row a layer and victim, with the columns of `LayerReport`, from the image on."""
        rows = []
        for layer in self.layers:
            for victim in range(len(self.images)):
                rows.append(
                    {
                        "layer": layer.name,
                        "victim": victim,
                        "unknowns": layer.unknowns,
                        "rank": layer.rank,
                        "deficit": layer.deficit,
                        "residual": float(layer.residual[victim]),
                        "condition": float(layer.condition[victim]),
                        "sign_flips": int(layer.sign_flips[victim]),
                        "steps": int(layer.steps[victim]),
                    }
                )
        return pd.DataFrame(rows)


def outside_box(images: Tensor) -> Tensor:
    """Mean squared distance of pixels from [0, 1], one number a row."""
    return (images - images.clamp(0, 1)).flatten(1).square().mean(1).nan_to_num(nan=torch.inf)
