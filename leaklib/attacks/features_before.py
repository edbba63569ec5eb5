"""The layers before a bottleneck as a function of the picture: a forward pass that stops there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from leaklib.gradients.stateless import without_side_effects


class _ReachedError(Exception):
    """Carries what enters the bottleneck out of a forward pass that need not go on."""

    def __init__(self, features: Tensor) -> None:
        super().__init__("the bottleneck")
        self.features = features


class _Stop(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        """Ends the pass here."""
        raise _ReachedError(features)


def features_before(
    model: nn.Module, bottleneck: str, image_shape: tuple[int, ...]
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """What enters the bottleneck as a function of one batch, safe under `vmap` and `vjp`.

    Where the features are the output of a ReLU, f gives its input instead: where h > 0 the two are
    equal, and a unit that is off by mistake has a slope again.

    Args:
        model: any module; not changed.
        bottleneck: name of a module in it.
        image_shape: of one input.

    Returns:
        Images (batch, *image_shape) to (batch, features), flattened; and whether a ReLU follows.

    Raises:
        ValueError: another layer that draws noise, or a bottleneck that is not called.
    """
    stopped = copy.deepcopy(model)
    parent, _, child = bottleneck.rpartition(".")
    setattr(stopped.get_submodule(parent), child, _Stop())
    frozen = without_side_effects(stopped).requires_grad_(False)
    last: list[tuple[Tensor, Tensor]] = []  # input and output of the last ReLU
    for module in frozen.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_forward_hook(lambda _m, args, out: last.append((args[0], out)))

    def run(images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        last.clear()
        try:
            frozen(images)
        except _ReachedError as reached:
            return reached.features.flatten(1), last[-1] if last else None
        raise ValueError(f"expected {bottleneck!r} to be called, it was not; remove it")

    weight = next(frozen.parameters())
    probe = torch.linspace(0, 1, prod(image_shape), dtype=weight.dtype, device=weight.device)
    features, relu = run(probe.view(1, *image_shape))
    follows = relu is not None and torch.equal(relu[1].flatten(1), features)

    def before(images: Tensor) -> Tensor:
        features, relu = run(images)
        return relu[0].flatten(1) if follows and relu is not None else features

    return before, follows
