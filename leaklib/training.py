"""Training a network, plainly: what the studies of training stage and of utility start from.

All randomness comes from one generator, so a run that was killed and started again from its
checkpoint ends with the same bits as one that was not (on the CPU).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from leaklib.checkpoint import digest, read_checkpoint, write_checkpoint
from leaklib.data import ImageSet
from leaklib.defenses import Defense
from leaklib.files import prepare_folder
from leaklib.gradients.stochastic import stochastic_layers
from leaklib.seeding import global_seed
from leaklib.training_steps import (
    Evaluation,
    State,
    checked_images,
    copy_weights,
    defended_steps,
    device_of,
    make_optimiser,
    measure,
    mode,
    one_epoch,
)


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves beside the trained model.

    Attributes:
        history: one row per epoch: `epoch` from 1, `loss` (with what stochastic layers add to it)
            and `accuracy` on the training images as they were seen, and `validation_loss`
            (cross-entropy alone), `validation_accuracy` where asked for.
        states: epoch -> state_dict on the CPU, for the epochs to keep; epoch 0 is untrained.
    """

    history: pd.DataFrame
    states: Mapping[int, State]


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
    defense: Defense | None = None,
) -> TrainingResult:
    """Minimise the mean cross-entropy over shuffled batches, in place.

    What stochastic layers add to the loss, such as a bottleneck's divergence, is minimised with it.
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
        defense: transforms the gradient of every step before the optimiser sees it, as a client
            does that never lets the raw one leave; its draws are of each epoch's stream too.

    Returns:
        The history and the kept weights.

    Raises:
        ValueError: bad settings or data, or a checkpoint that is damaged or of another run.
        OSError: the folder of the checkpoint cannot be made or written.
        FloatingPointError: the loss is no longer finite.
    """
    _check_settings(epochs, batch_size, lr, keep_epochs)
    seen = checked_images(data, "data")
    held_out = None if validation is None else checked_images(validation, "validation")
    steps = make_optimiser(model, optimiser, lr)
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
            "defense": None if defense is None else repr(defense),
        }
    history: list[dict[str, float]] = []
    states = {0: copy_weights(model)} if 0 in keep_epochs else {}
    if path is not None and (saved := read_checkpoint(path, settings=settings)) is not None:
        _check_resumable(path, saved, epochs, keep_epochs)
        model.load_state_dict(saved["model"])
        steps.load_state_dict(saved["steps"])
        generator.set_state(saved["generator"])
        history, states = saved["history"], saved["states"]
    batches = math.ceil(len(seen.images) / batch_size)
    done, total = len(history) * batches, epochs * batches
    bar = tqdm(initial=done, total=total, unit="batch", disable=not progress)
    with bar, mode(model, training=True), torch.enable_grad():
        for epoch in range(len(history) + 1, epochs + 1):
            bar.set_description(f"epoch {epoch} of {epochs}")
            seed = torch.randint(2**31, (), generator=generator, device=generator.device)
            with global_seed(int(seed), device_of(model)):
                defend = None
                if defense is not None:
                    defend = defended_steps(defense, int(seed), device_of(model))
                row = one_epoch(model, seen, steps, batch_size, generator, bar, defend)
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(f"loss {row['loss']} in epoch {epoch}: lower lr={lr}")
                if held_out is not None:
                    accuracy, loss = measure(model, held_out)
                    row |= {"validation_loss": loss, "validation_accuracy": accuracy}
            history.append({"epoch": epoch, **row})
            bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
            if epoch in keep_epochs:
                states[epoch] = copy_weights(model)
            if path is not None:
                content: dict[str, Any] = {
                    "model": copy_weights(model),
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
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 512,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Evaluation:
    """Accuracy and mean cross-entropy in eval mode; the model gets its former mode back.

    A model that draws noise in eval mode too, as PRECODE's does, is measured with fresh noise for
    every image and draw; the answer is the mean over the draws, not the vote of their logits.

    Args:
        model: logits (images, classes) from images.
        images: (images, channels, height, width); moved to the model's device and dtype.
        labels: (images,) int64.
        batch_size: images at a time; changes speed, memory and the order of the noise only.
        draws: passes over the images with fresh noise; a deterministic model needs one.
        generator: seeds the noise; needed by a model that draws, else left alone.

    Returns:
        (accuracy, loss), also by name.

    Raises:
        ValueError: shapes or labels that do not fit the model or each other, no draw, or a model
            that draws noise without a generator.
    """
    data = checked_images((images, labels), "images and labels")
    if draws < 1:
        raise ValueError(f"expected draws >= 1, got {draws}")
    with mode(model, training=False):
        drawing = stochastic_layers(model)
        if not drawing:
            return measure(model, data, batch_size)
        if generator is None:
            raise ValueError(
                f"expected a generator for the noise of {', '.join(drawing)}, got none; pass "
                "generator=torch.Generator().manual_seed(seed)"
            )
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        with global_seed(seed, device_of(model)):
            measured = [measure(model, data, batch_size) for _ in range(draws)]
    return Evaluation(
        accuracy=sum(one.accuracy for one in measured) / draws,
        loss=sum(one.loss for one in measured) / draws,
    )


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
