"""What every defense shares: its call, and the checks of what it is given."""

import math
from typing import Protocol

import torch
from torch import Tensor

from leaklib.gradients.payload import SharedGradient


class Defense(Protocol):
    """Anything that turns a shared gradient into the one that is released."""

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return the released gradient; `shared` itself is not changed."""
        ...


def check_generator(
    generator: torch.Generator | None, device: torch.device, defense: str
) -> torch.Generator:
    """Refuse a missing generator, or one of another device.

    Raises:
        ValueError: With the line that makes the right one.
    """
    make = f'torch.Generator("{device}").manual_seed(seed)'
    if generator is None:
        raise ValueError(f"expected a generator for {defense}, got none; pass generator={make}")
    ours, theirs = generator.device, device
    indexed = ours.index is not None and theirs.index is not None
    if ours.type != theirs.type or (indexed and ours.index != theirs.index):
        raise ValueError(
            f"expected a generator on {device}, the device of the gradient, got one on {ours}; "
            f"pass generator={make}"
        )
    return generator


def check_choice(value: object, known: tuple[object, ...], setting: str) -> None:
    """Refuse a setting outside the list of known ones.

    Raises:
        ValueError: With that list.
    """
    if value not in known:
        choices = ", ".join(repr(one) for one in known)
        raise ValueError(f"expected {setting} to be one of {choices}, got {value!r}")


def check_level(value: float, setting: str, *, allow_zero: bool) -> None:
    """Refuse a strength that is negative, infinite or NaN.

    Raises:
        ValueError: With the range.
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not allow_zero):
        raise ValueError(
            f"expected a finite {setting} {'>=' if allow_zero else '>'} 0, got {value}"
        )


def rows(tensor: Tensor) -> Tensor:
    """One row per victim, (victims, entries); a scalar parameter has one entry."""
    return tensor.reshape(tensor.shape[0], tensor[0].numel())


def squared_norms(shared: SharedGradient) -> dict[str, Tensor]:
    """Squared L2 norm of every tensor and victim, (victims,) float64.

    Float64 because the squares of a float16 gradient underflow.
    """
    return {
        name: torch.linalg.vector_norm(rows(tensor), dim=1, dtype=torch.float64).square()
        for name, tensor in shared.items()
    }


def per_victim(factor: Tensor, tensor: Tensor) -> Tensor:
    """One number per victim, (victims,), shaped and typed to multiply `tensor`."""
    return factor.to(tensor.dtype).reshape(-1, *(1,) * (tensor.ndim - 1))
