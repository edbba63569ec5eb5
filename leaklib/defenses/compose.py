"""Putting defenses together: one after the other, or on some layers only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from leaklib.defenses._base import Defense
from leaklib.gradients.payload import SharedGradient

__all__ = ["Compose", "Only"]


@dataclass(frozen=True)
class Compose:
    """Apply defenses from left to right, all with the same generator.

    Settings:
        defenses: The defenses; an empty sequence is "no defense".

    Raises:
        ValueError: An entry that cannot be called.

    Clip to length 1, then keep the signs:

    >>> from leaklib.defenses import Clip, Sign
    >>> shared = SharedGradient({"fc.weight": torch.tensor([[3.0, -4.0]])}, batch=1)
    >>> Compose([Clip(1.0), Sign(scaled=True)])(shared).tensors["fc.weight"]
    tensor([[ 0.7000, -0.7000]])
    """

    defenses: Sequence[Defense] = ()

    def __post_init__(self) -> None:
        if callable(self.defenses):
            raise ValueError(
                f"expected a sequence of defenses, got {self.defenses!r}; write Compose([...])"
            )
        # A tuple whatever came in: settings are frozen and can be compared and hashed.
        object.__setattr__(self, "defenses", tuple(self.defenses))
        for defense in self.defenses:
            _check_callable(defense)

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return what the last defense releases."""
        for defense in self.defenses:
            shared = defense(shared, generator=generator)
        return shared


@dataclass(frozen=True)
class Only:
    """Apply a defense to some layers and pass the others on untouched, as the same tensors.

    The defense sees nothing but the chosen layers: a global norm, quantile or rms is theirs.

    Settings:
        layers: Parameter names ("fc.weight") or module prefixes ("body.0"); see
            :func:`leaklib.gradients.payload.match_parameters`.
        defense: What is applied to them.

    Raises:
        ValueError: No layer, or a defense that cannot be called; at the call, a layer that
            matches no shared tensor.

    >>> from leaklib.defenses import Sign
    >>> ones = torch.ones(1, 2)
    >>> shared = SharedGradient({"body.weight": 3 * ones, "fc.weight": 5 * ones}, batch=1)
    >>> released = Only(["body"], Sign())(shared)
    >>> {name: tensor.tolist() for name, tensor in released.items()}
    {'body.weight': [[1.0, 1.0]], 'fc.weight': [[5.0, 5.0]]}
    """

    layers: Sequence[str]
    defense: Defense

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        if not layers or not all(isinstance(layer, str) and layer for layer in layers):
            raise ValueError(
                f"expected names of layers, got {layers}; for all layers use the defense itself"
            )
        object.__setattr__(self, "layers", layers)
        _check_callable(self.defense)

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return the gradient with the chosen layers defended."""
        released = self.defense(shared.select(self.layers), generator=generator)
        return shared.replace({**shared.tensors, **released.tensors})


def _check_callable(defense: object) -> None:
    if not callable(defense) or isinstance(defense, type):
        raise ValueError(
            f"expected a defense such as Prune(0.9), got {defense!r}; make an instance of it"
        )
