"""Training a network, plainly: what the studies of training stage and of utility start from.

All randomness comes from one generator, so a run that was killed and started again from its
checkpoint ends with the same bits as one that was not (on the CPU).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from leaklib.checkpoint import digest, read_checkpoint, write_checkpoint
from leaklib.data import ImageSet
from leaklib.files import prepare_folder
from leaklib.seeding import global_seed

State = dict[str, Tensor]
OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves beside the trained model.

    Attributes:
        history: one row per epoch: `epoch` from 1, `loss` and `accuracy` on the training images
            as they were seen, and `validation_loss`, `validation_accuracy` where asked for.
        states: epoch -> state_dict on the CPU, for the epochs to keep; epoch 0 is untrained.
    """

    history: pd.DataFrame
    states: Mapping[int, State]


class Evaluation(NamedTuple):
    """Accuracy in [0, 1] and mean cross-entropy in nats."""

    accuracy: float
    loss: float


class _Data(NamedTuple):
    images: Tensor
    labels: Tensor
    highest: int  # label; read once, since reading from a GPU makes it wait

    @property
    def tensors(self) -> State:
        return {"images": self.images, "labels": self.labels}


def train(
    model: nn.Module,
    data: ImageSet | tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    optimiser: str = "adam",
    generator: torch.Generator,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    validation: ImageSet | tuple[Tensor, Tensor] | None = None,
    keep_epochs: Collection[int] = (),
) -> TrainingResult:
    """Minimise the mean cross-entropy over shuffled batches, in place.

    The model is in train mode meanwhile and gets its former mode back. Images follow the model's
    device and dtype batch by batch. Layers that draw random numbers, such as dropout, draw from a
    stream that `generator` seeds anew each epoch; the global generators stay untouched.

    Args:
        model: logits (images, classes) from images; changed in place.
        data: an image set, or images (images, channels, height, width) and labels (images,).
        epochs: passes over the data, counted from the untrained model, at least 1.
        batch_size: images per step; the last batch of an epoch may be smaller.
        lr: learning rate.
        optimiser: "adam" (PRECODE's choice) or "sgd", with PyTorch's defaults.
        generator: source of the order of the images; advanced.
        checkpoint: file written after each epoch under a temporary name and renamed. If it exists
            the run goes on from it, provided that model, generator, data and settings are what
            the first run started with; a larger `epochs` extends a finished run.
        progress: show a bar with the time left.
        validation: images that are only measured, after each epoch.
        keep_epochs: epochs whose weights to return; 0 is before training.

    Returns:
        The history and the kept weights.

    Raises:
        ValueError: bad settings or data, or a checkpoint that is damaged or of another run.
        OSError: the folder of the checkpoint cannot be made or written.
        FloatingPointError: the loss is no longer finite.
    """
    _check_settings(epochs, batch_size, lr, keep_epochs)
    seen = _checked(data, "data")
    held_out = None if validation is None else _checked(validation, "validation")
    steps = _optimiser(model, optimiser, lr)
    path = None if checkpoint is None else Path(checkpoint)
    settings: dict[str, Any] = {}
    if path is not None:
        prepare_folder(path.parent)
        settings = {
            "batch_size": batch_size,
            "lr": lr,
            "optimiser": optimiser,
            "data": digest(seen.tensors),
            "validation": held_out and digest(held_out.tensors),
            "initial weights": digest(model.state_dict()),
            "generator": digest({"state": generator.get_state()}),
        }
    history: list[dict[str, float]] = []
    states = {0: _copy(model)} if 0 in keep_epochs else {}
    if path is not None and (saved := read_checkpoint(path, settings=settings)) is not None:
        _check_resumable(path, saved, epochs, keep_epochs)
        model.load_state_dict(saved["model"])
        steps.load_state_dict(saved["steps"])
        generator.set_state(saved["generator"])
        history, states = saved["history"], saved["states"]
    batches = math.ceil(len(seen.images) / batch_size)
    done, total = len(history) * batches, epochs * batches
    bar = tqdm(initial=done, total=total, unit="batch", disable=not progress)
    with bar, _mode(model, training=True), torch.enable_grad():
        for epoch in range(len(history) + 1, epochs + 1):
            bar.set_description(f"epoch {epoch} of {epochs}")
            seed = torch.randint(2**31, (), generator=generator, device=generator.device)
            with global_seed(int(seed), _device(model)):
                row = _one_epoch(model, seen, steps, batch_size, generator, bar)
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(f"loss {row['loss']} in epoch {epoch}: lower lr={lr}")
                if held_out is not None:
                    accuracy, loss = _evaluate(model, held_out)
                    row |= {"validation_loss": loss, "validation_accuracy": accuracy}
            history.append({"epoch": epoch, **row})
            bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
            if epoch in keep_epochs:
                states[epoch] = _copy(model)
            if path is not None:
                content: dict[str, Any] = {
                    "model": _copy(model),
                    "steps": steps.state_dict(),
                    "generator": generator.get_state(),
                    "history": history,
                    "states": states,
                }
                write_checkpoint(path, content, settings=settings)
    steps.zero_grad()
    kept = {epoch: states[epoch] for epoch in sorted(keep_epochs)}
    return TrainingResult(history=pd.DataFrame(history), states=kept)


def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512
) -> Evaluation:
    """Accuracy and mean cross-entropy in eval mode; the model gets its former mode back.

    Args:
        model: logits (images, classes) from images.
        images: (images, channels, height, width); moved to the model's device and dtype.
        labels: (images,) int64.
        batch_size: images at a time; changes speed and memory only.

    Returns:
        (accuracy, loss), also by name.

    Raises:
        ValueError: shapes or labels that do not fit the model or each other.
    """
    return _evaluate(model, _checked((images, labels), "images and labels"), batch_size)


@torch.no_grad()
def _evaluate(model: nn.Module, data: _Data, batch_size: int = 512) -> Evaluation:
    loss, hits = 0.0, 0
    with _mode(model, training=False):
        for rows in torch.arange(len(data.images)).split(batch_size):
            logits, target = _forward(model, data, rows)
            loss += cross_entropy(logits, target, reduction="sum").item()
            hits += int((logits.argmax(1) == target).sum())
    return Evaluation(accuracy=hits / len(data.images), loss=loss / len(data.images))


def _one_epoch(
    model: nn.Module,
    data: _Data,
    steps: torch.optim.Optimizer,
    batch_size: int,
    generator: torch.Generator,
    bar: tqdm,
) -> dict[str, float]:
    loss_sum = torch.zeros((), device=_device(model))
    hits = torch.zeros((), device=_device(model), dtype=torch.int64)
    order = torch.randperm(len(data.images), generator=generator, device=generator.device)
    for rows in order.to(data.images.device).split(batch_size):
        logits, target = _forward(model, data, rows)
        loss = cross_entropy(logits, target)
        steps.zero_grad()
        loss.backward()
        steps.step()
        # the sums stay on the device: reading them at every step would make a GPU wait
        loss_sum = loss_sum + loss.detach() * len(rows)
        hits = hits + (logits.argmax(1) == target).sum()
        bar.update()
    count = len(data.images)
    return {"loss": loss_sum.item() / count, "accuracy": hits.item() / count}


def _forward(model: nn.Module, data: _Data, rows: Tensor) -> tuple[Tensor, Tensor]:
    weight = next(model.parameters())
    logits = model(data.images[rows].to(weight.device, weight.dtype))
    # an impossible label is an unreadable assertion on a GPU
    if logits.ndim != 2 or logits.shape[1] <= data.highest:
        raise ValueError(
            f"expected logits (images, classes) for labels up to {data.highest}, got "
            f"{tuple(logits.shape)}; build the model with classes={data.highest + 1} or more"
        )
    return logits, data.labels[rows].to(weight.device)


def _checked(data: ImageSet | tuple[Tensor, Tensor], what: str) -> _Data:
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
    return _Data(images, labels, int(labels.max()))


def _check_settings(epochs: int, batch_size: int, lr: float, keep_epochs: Collection[int]) -> None:
    if epochs < 1 or batch_size < 1 or not 0 < lr < math.inf:
        raise ValueError(
            "expected epochs >= 1, batch_size >= 1 and finite lr > 0, "
            f"got epochs={epochs}, batch_size={batch_size}, lr={lr}"
        )
    outside = sorted(set(keep_epochs) - set(range(epochs + 1)))
    if outside:
        raise ValueError(f"keep_epochs: expected epochs from 0 to {epochs}, got {outside}")


def _check_resumable(
    path: Path, saved: Mapping[str, Any], epochs: int, keep_epochs: Collection[int]
) -> None:
    done = len(saved["history"])
    if done > epochs:
        raise ValueError(
            f"{path} is already at epoch {done}, beyond epochs={epochs}: "
            f"ask for at least {done}, or name another file"
        )
    missed = sorted(e for e in keep_epochs if e <= done and e not in saved["states"])
    if missed:
        raise ValueError(
            f"{path} is at epoch {done} and did not keep epochs {missed}: "
            "leave them out of keep_epochs, or name another file"
        )


def _optimiser(model: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("expected a parameter with requires_grad=True, got none; unfreeze one")
    if name not in OPTIMISERS:
        raise ValueError(f"unknown optimiser {name!r}: choose one of {', '.join(OPTIMISERS)}")
    return OPTIMISERS[name](weights, lr=lr)


def _copy(model: nn.Module) -> State:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode; afterwards every module is in the mode it came with."""
    former = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in former.items():
            module.training = mode
