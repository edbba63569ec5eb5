"""The payload: what leaves the client, and the checks that it fits the model it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

Reduction = Literal["mean", "sum"]
Statistics = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FedAvg:
    """Local training before sharing: `steps` of plain gradient descent on the whole local batch.

    The client shares (θ₀ − θ_steps) / lr, the sum of its local gradients; one step is the gradient
    itself. Source: McMahan et al. 2017, Algorithm 1, with full-batch local steps.

    Args:
        steps: number of local steps, >= 1.
        lr: local learning rate, > 0.
    """

    steps: int = 1
    lr: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0:
            raise ValueError(
                f"expected steps >= 1 and lr > 0, got steps={self.steps}, lr={self.lr}; "
                "steps=1 is the plain gradient"
            )


@dataclass(frozen=True)
class SharedGradient:
    """What leaves the client, for many clients at once.

    Args:
        tensors: parameter name -> (victims, *parameter shape).
        batch: private images behind each victim's gradient.
        reduction: how the loss was reduced over the batch, "mean" or "sum".
        protocol: local training before sharing; None is one plain gradient (FedSGD).
        statistics: BatchNorm layer name -> (mean, variance) of its input, each
            (victims, channels), where the client shares them; None otherwise.
    """

    tensors: Mapping[str, Tensor]
    batch: int
    reduction: Reduction = "mean"
    protocol: FedAvg | None = None
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("expected at least one shared tensor, got none; share some layer")
        counts = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in self.items()}
        if len(set(counts.values())) != 1 or not next(iter(counts.values())):
            raise ValueError(
                f"expected one leading victim axis of equal length in every tensor, got {counts}; "
                "a single gradient needs tensor[None]"
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"expected reduction 'mean' or 'sum', got {self.reduction!r}")
        if self.batch < 1:
            raise ValueError(f"expected batch >= 1, got {self.batch}")

    @property
    def victims(self) -> int:
        """Number of victims."""
        return next(iter(self.tensors.values())).shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the shared parameters."""
        return tuple(self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the shared tensors."""
        return next(iter(self.tensors.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the shared tensors."""
        return next(iter(self.tensors.values())).device

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """Pairs of parameter name and tensor."""
        return self.tensors.items()

    def replace(self, tensors: Mapping[str, Tensor]) -> SharedGradient:
        """The same release with other tensors: what a defense returns."""
        return replace(self, tensors=dict(tensors))

    def select(self, layers: Iterable[str]) -> SharedGradient:
        """Keep the named layers only (see `match_parameters`)."""
        return self.replace({n: self.tensors[n] for n in match_parameters(self.names, layers)})


def concatenate(releases: Sequence[SharedGradient]) -> SharedGradient:
    """Several releases as one, the victims of one behind those of the other.

    So that one batched attack serves many levels of a defense.

    Args:
        releases: same names, shapes, batch, reduction and protocol; without statistics.

    Returns:
        SharedGradient with the sum of the victims.

    Raises:
        ValueError: nothing given, or releases that differ in more than their values.

    >>> one = SharedGradient({"fc.bias": torch.zeros(2, 3)}, batch=1)
    >>> concatenate([one, one, one]).victims
    6
    """
    if not releases:
        raise ValueError("expected at least one release, got none")
    first = releases[0]
    for other in releases[1:]:
        for what in ("names", "batch", "reduction", "protocol"):
            if getattr(other, what) != getattr(first, what):
                raise ValueError(
                    f"expected releases of one {what}, got {getattr(first, what)} and "
                    f"{getattr(other, what)}; attack them one after the other"
                )
    if any(one.statistics is not None for one in releases):
        raise ValueError("expected releases without BatchNorm statistics; attack them one by one")
    return first.replace({n: torch.cat([one.tensors[n] for one in releases]) for n in first.names})


def match_parameters(names: Iterable[str], layers: Iterable[str] | str) -> tuple[str, ...]:
    """Parameters that a list of layers means, in the order of `names`.

    A layer is a parameter name ("fc.weight") or a module prefix ("fc", "layer1.0").

    Raises:
        ValueError: a layer matches nothing; the message lists the known names.

    >>> match_parameters(["conv1.weight", "fc.weight", "fc.bias"], ["fc"])
    ('fc.weight', 'fc.bias')
    """
    known = tuple(names)
    wanted = (layers,) if isinstance(layers, str) else tuple(layers)
    for layer in wanted:
        if not any(name == layer or name.startswith(layer + ".") for name in known):
            raise ValueError(
                f"expected a parameter or module prefix, got {layer!r}; known: {', '.join(known)}"
            )
    kept = tuple(n for n in known if any(n == w or n.startswith(w + ".") for w in wanted))
    if not kept:
        raise ValueError(f"expected at least one layer, got none; known: {', '.join(known)}")
    return kept


def check_finite(shared: SharedGradient) -> None:
    """Refuse a gradient with NaN or infinity.

    Raises:
        ValueError: naming the first parameter and victim at fault.
    """
    for name, tensor in shared.items():
        bad = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1)
        if bad.any():
            raise ValueError(
                f"expected finite gradients, got NaN or infinity in {name!r} of victim "
                f"{int(bad.nonzero()[0])}; check the images, the weights and the loss"
            )


def check_payload(model: nn.Module, shared: SharedGradient) -> None:
    """Refuse a payload that the model cannot have produced: names, shapes, dtype, finiteness.

    Raises:
        ValueError: naming the tensor at fault and what the model has.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor in shared.items():
        if name not in params:
            raise ValueError(
                f"expected names of the model's parameters, got {name!r}; known: "
                f"{', '.join(params)}"
            )
        if tensor.shape[1:] != params[name].shape:
            raise ValueError(
                f"expected {name!r} of shape (victims, {', '.join(map(str, params[name].shape))}), "
                f"got {tuple(tensor.shape)}; was the gradient taken on another model?"
            )
        if tensor.dtype != params[name].dtype or tensor.device != params[name].device:
            raise ValueError(
                f"expected {name!r} as {params[name].dtype} on {params[name].device}, got "
                f"{tensor.dtype} on {tensor.device}; move the model with model.to(...)"
            )
    check_finite(shared)
    _check_statistics(model, shared)


def _check_statistics(model: nn.Module, shared: SharedGradient) -> None:
    """Refuse BatchNorm statistics that the model cannot have measured."""
    layers = {
        name: module.num_features
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    for name, pair in (shared.statistics or {}).items():
        wanted = (shared.victims, layers.get(name, 0))
        if name not in layers or any(tuple(part.shape) != wanted for part in pair):
            raise ValueError(
                f"expected statistics (victims, channels) of BatchNorm layers {layers}, got "
                f"{name!r} of shapes {[tuple(part.shape) for part in pair]}"
            )
        if not all(bool(torch.isfinite(part).all()) for part in pair):
            raise ValueError(f"expected finite statistics, got NaN or infinity in {name!r}")
