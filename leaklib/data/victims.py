"""The private batches that are attacked; made from an image set by `data.make_victims`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Victims:
    """Private batches: what a client trains on, and what an attack must never receive.

    Attributes:
        images: `(victims, batch, channels, height, width)`, floating point in [0, 1].
        labels: `(victims, batch)` int64, or soft labels `(victims, batch, classes)` in floating
            point, each row a probability vector.

    Raises:
        TypeError: A dtype is not the one above.
        ValueError: A shape, a device or a value is not as above; the first bad victim is named.

    Example:
        >>> victims = Victims(torch.zeros(3, 2, 1, 8, 8), torch.zeros(3, 2, dtype=torch.int64))
        >>> len(victims), victims.batch, victims[1:].images.shape
        (3, 2, torch.Size([2, 2, 1, 8, 8]))
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not images.is_floating_point():
            raise TypeError(
                f"expected floating-point images in [0, 1], got {images.dtype}; "
                "for 8-bit pixels pass images.float() / 255"
            )
        if images.ndim != 5 or images.numel() == 0:
            raise ValueError(
                "expected non-empty images (victims, batch, channels, height, width), got "
                f"{tuple(images.shape)}; for one picture a victim use images.unsqueeze(1)"
            )
        bad = _first(~images.isfinite())
        if bad is not None:
            raise ValueError(
                f"expected finite images, got NaN or infinity in victim {bad}; mend it"
            )
        bad = _first((images < 0) | (images > 1))
        if bad is not None:
            low, high = images[bad].min().item(), images[bad].max().item()
            raise ValueError(
                f"expected images in [0, 1], got victim {bad} in [{low:.4g}, {high:.4g}]; "
                "divide 8-bit pixels by 255 and leave normalisation to the model"
            )
        if labels.device != images.device:
            raise ValueError(
                f"expected labels on {images.device} like the images, got {labels.device}; "
                "move both with Victims.to(device=...)"
            )
        self._check_labels()

    def _check_labels(self) -> None:
        labels, shape = self.labels, tuple(self.images.shape[:2])
        if labels.is_floating_point():
            if labels.ndim != 3 or tuple(labels.shape[:2]) != shape:
                raise ValueError(
                    f"expected soft labels (victims, batch, classes) = {shape} + (classes,), got "
                    f"{tuple(labels.shape)}; hard labels must be int64"
                )
            # a row that was normalised in half precision is off by its own rounding
            tolerance = max(1e-5, 4 * torch.finfo(labels.dtype).eps)
            wrong = (labels.double().sum(-1) - 1).abs() > tolerance
            bad = _first(wrong | ~(labels >= 0).all(-1))
            if bad is not None:
                raise ValueError(
                    "expected soft labels with rows >= 0 that sum to one, got "
                    f"{labels[bad].tolist()} in victim {bad}; pass probabilities, not logits"
                )
            return
        if labels.dtype != torch.int64:
            raise TypeError(f"expected int64 labels, got {labels.dtype}; pass labels.long()")
        if tuple(labels.shape) != shape:
            raise ValueError(
                f"expected labels (victims, batch) = {shape}, got {tuple(labels.shape)}; "
                "one label a picture"
            )
        bad = _first(labels < 0)
        if bad is not None:
            raise ValueError(
                f"expected labels >= 0, got {labels[bad].tolist()} in victim {bad}; "
                "count classes from 0"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def inputs(self) -> Tensor:
        """The images, under the name that every private input has."""
        return self.images

    @property
    def batch(self) -> int:
        """Pictures a victim."""
        return self.images.shape[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`."""
        channels, height, width = self.images.shape[2:]
        return channels, height, width

    def __getitem__(self, which: int | slice | Sequence[int] | Tensor) -> Victims:
        """Return some victims; one number gives one victim, still with its victim axis."""
        if isinstance(which, int):
            if not -len(self) <= which < len(self):
                raise IndexError(f"expected a victim below {len(self)}, got {which}")
            which = [which]
        key = which if isinstance(which, slice | Tensor) else list(which)
        return Victims(self.images[key], self.labels[key])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Victims:
        """Return the victims on a device and in a floating-point dtype; int64 labels stay int64."""
        soft = self.labels.is_floating_point()
        return Victims(
            self.images.to(device=device, dtype=dtype),
            self.labels.to(device=device, dtype=dtype if soft else None),
        )


@dataclass(frozen=True, eq=False)
class PrivateInputs:
    """Private batches of any continuous input, such as the embeddings of a sentence.

    Attributes:
        inputs: `(victims, batch, *input shape)`, finite floating point of any range.
        labels: `(victims, batch, ...)`, whatever the client's loss takes.

    Raises:
        TypeError: Inputs that are not floating point.
        ValueError: No input, a value that is not finite, or labels that do not fit.

    Example:
        >>> private = PrivateInputs(torch.randn(3, 1, 8, 16), torch.zeros(3, 1, dtype=torch.int64))
        >>> len(private), private.input_shape
        (3, (8, 16))
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        inputs, labels = self.inputs, self.labels
        if not inputs.is_floating_point():
            raise TypeError(
                f"expected floating-point inputs, got {inputs.dtype}; embed tokens first"
            )
        if inputs.ndim < 3 or inputs.numel() == 0:
            raise ValueError(
                "expected non-empty inputs (victims, batch, *input shape), got "
                f"{tuple(inputs.shape)}; for one input a victim use inputs.unsqueeze(1)"
            )
        bad = _first(~inputs.isfinite())
        if bad is not None:
            raise ValueError(
                f"expected finite inputs, got NaN or infinity in victim {bad}; mend it"
            )
        if labels.shape[:2] != inputs.shape[:2] or labels.device != inputs.device:
            raise ValueError(
                f"expected labels {tuple(inputs.shape[:2])} + (...) on {inputs.device}, got "
                f"{tuple(labels.shape)} on {labels.device}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.inputs.shape[2:])


def _first(bad: Tensor) -> int | None:
    """Return the first index of the leading axis with a true entry."""
    found = bad.flatten(1).any(1).nonzero()
    return int(found[0, 0]) if len(found) else None
