"""What plain and federated training share: data in order, one epoch, one measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from leaklib.data import ImageSet
from leaklib.defenses import Defense
from leaklib.gradients.payload import SharedGradient
from leaklib.gradients.stochastic import add_losses, collected_losses

State = dict[str, Tensor]
# gradients by name and the number of images behind them -> what the optimiser gets
Defend = Callable[[State, int], State]
OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class Evaluation(NamedTuple):
    """Accuracy in [0, 1] and mean cross-entropy in nats."""

    accuracy: float
    loss: float


class LabelledImages(NamedTuple):
    """Images (images, channels, height, width) and labels (images,) that were checked."""

    images: Tensor
    labels: Tensor
    highest: int  # label; read once, since reading from a GPU makes it wait

    @property
    def tensors(self) -> State:
        """By name, for a digest."""
        return {"images": self.images, "labels": self.labels}

    def at(self, rows: Tensor) -> LabelledImages:
        """Some of them."""
        return LabelledImages(self.images[rows], self.labels[rows], self.highest)


@torch.no_grad()
def measure(model: nn.Module, data: LabelledImages, batch_size: int = 512) -> Evaluation:
    """One pass in eval mode; noise, where the model draws it, is torch's global stream."""
    loss, hits = 0.0, 0
    with mode(model, training=False):
        for rows in torch.arange(len(data.images)).split(batch_size):
            logits, target = forward(model, data, rows)
            loss += cross_entropy(logits, target, reduction="sum").item()
            hits += int((logits.argmax(1) == target).sum())
    return Evaluation(accuracy=hits / len(data.images), loss=loss / len(data.images))


def one_epoch(
    model: nn.Module,
    data: LabelledImages,
    steps: torch.optim.Optimizer,
    batch_size: int,
    generator: torch.Generator,
    bar: tqdm,
    defend: Defend | None = None,
) -> dict[str, float]:
    """Steps over all images in a new order: mean loss and accuracy as they were seen.

    The loss holds what stochastic layers add to it.
    """
    loss_sum = torch.zeros((), device=device_of(model))
    hits = torch.zeros((), device=device_of(model), dtype=torch.int64)
    order = torch.randperm(len(data.images), generator=generator, device=generator.device)
    for rows in order.to(data.images.device).split(batch_size):
        with collected_losses() as terms:
            logits, target = forward(model, data, rows)
        loss = add_losses(cross_entropy(logits, target), terms, "mean")
        steps.zero_grad()
        loss.backward()
        if defend is not None:
            _defend_gradients(model, defend, len(rows))
        steps.step()
        # the sums stay on the device: reading them at every step would make a GPU wait
        loss_sum = loss_sum + loss.detach() * len(rows)
        hits = hits + (logits.argmax(1) == target).sum()
        bar.update()
    count = len(data.images)
    return {"loss": loss_sum.item() / count, "accuracy": hits.item() / count}


def defended_steps(defense: Defense, seed: int, device: torch.device) -> Defend:
    """A defense as a function of one client's tensors, with a stream of draws of its own.

    Args:
        defense: what a victim's release would go through.
        seed: of that of the epoch, below 2³¹.
        device: of the model.

    Returns:
        (name -> tensor, images behind it) -> name -> tensor.
    """
    # not the seed itself: the layers draw from that stream, and noise must not repeat theirs
    generator = torch.Generator(device).manual_seed(seed + 2**31)

    def defend(tensors: State, batch: int) -> State:
        shared = SharedGradient({name: tensor[None] for name, tensor in tensors.items()}, batch)
        released = defense(shared, generator=generator)
        return {name: tensor[0] for name, tensor in released.items()}

    return defend


def _defend_gradients(model: nn.Module, defend: Defend, batch: int) -> None:
    """Replace the gradients by their released form."""
    found = {n: p for n, p in model.named_parameters() if p.grad is not None}
    released = defend({n: p.grad for n, p in found.items() if p.grad is not None}, batch)
    for name, parameter in found.items():
        parameter.grad = released[name]


def forward(model: nn.Module, data: LabelledImages, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels of some images, on the model's device.

    Raises:
        ValueError: logits that do not fit the labels.
    """
    weight = next(model.parameters())
    logits = model(data.images[rows].to(weight.device, weight.dtype))
    # an impossible label is an unreadable assertion on a GPU
    if logits.ndim != 2 or logits.shape[1] <= data.highest:
        raise ValueError(
            f"expected logits (images, classes) for labels up to {data.highest}, got "
            f"{tuple(logits.shape)}; build the model with classes={data.highest + 1} or more"
        )
    return logits, data.labels[rows].to(weight.device)


def checked_images(data: ImageSet | tuple[Tensor, Tensor], what: str) -> LabelledImages:
    """Refuse images and labels that no training can use.

    Raises:
        ValueError: with `what` in front.
    """
    images, labels = data if isinstance(data, tuple) else (data.images, data.labels)
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(images) == 0:
        raise ValueError(
            f"{what}: expected images (images, channels, height, width) and labels (images,), "
            f"at least one, got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if not images.is_floating_point() or not images.isfinite().all():
        raise ValueError(f"{what}: expected finite floating-point pixels, got {images.dtype}")
    if labels.dtype != torch.int64 or labels.min() < 0:
        raise ValueError(f"{what}: expected int64 labels from 0, got {labels.dtype}")
    return LabelledImages(images, labels, int(labels.max()))


def make_optimiser(model: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    """A fresh optimiser of the trainable parameters.

    Raises:
        ValueError: none is trainable, or an unknown name.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("expected a parameter with requires_grad=True, got none; unfreeze one")
    if name not in OPTIMISERS:
        raise ValueError(f"unknown optimiser {name!r}: choose one of {', '.join(OPTIMISERS)}")
    return OPTIMISERS[name](weights, lr=lr)


def copy_weights(model: nn.Module) -> State:
    """The state_dict on the CPU, apart from the model."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter is."""
    return next(model.parameters()).device


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode; afterwards every module is in the mode it came with."""
    former = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, before in former.items():
            module.training = before
