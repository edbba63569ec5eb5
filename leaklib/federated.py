"""Federated averaging: several clients train one model, and only what they release moves it.

    round:  θ_c = local epochs of Adam on client c's images, from θ;   θ ← Σ_c n_c θ_c / Σ_c n_c

A defense acts where the attacker looks: on the gradient of every local step, or on the update
θ − θ_c that a client uploads. All randomness comes from one generator, so a run that was killed and
started again from its checkpoint ends with the same bits as one that was not (on the CPU).

Source: McMahan et al. 2017; settings of Scheliga, Mäder, Seeland (arXiv 2309.04515), released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from leaklib.checkpoint import digest, read_checkpoint, write_checkpoint
from leaklib.data import ImageSet
from leaklib.defenses import Defense
from leaklib.federated_schedule import Federation, best_round, finished, learning_rate
from leaklib.files import prepare_folder
from leaklib.seeding import global_seed
from leaklib.training_steps import (
    Defend,
    LabelledImages,
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
class FederatedResult:
    """What a federated run leaves beside the trained model.

    Attributes:
        history: one row per round: `round` from 1, the clients' `lr`, their mean `loss` and
            `accuracy` as they saw their images, in their last local epoch, and `validation_loss`
            (cross-entropy alone), `validation_accuracy` of the averaged model where there is
            validation.
        best_round: the one whose weights the model has now.
        client_images: images that each client trained on.
    """

    history: pd.DataFrame
    best_round: int
    client_images: tuple[int, ...]


def split_clients(
    images: int, clients: int, validation_share: float, *, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Indices of every client's training and validation images, identically distributed.

    Args:
        images: how many there are.
        clients: how many parts.
        validation_share: of each part, rounded to whole images.
        generator: draws the order; advanced.

    Returns:
        For each client (training, validation).

    Raises:
        ValueError: fewer images than give every client one to train on, and one to measure where a
            share is asked for.

    >>> parts = split_clients(50, 5, 0.2, generator=torch.Generator().manual_seed(0))
    >>> [(len(training), len(validation)) for training, validation in parts]
    [(8, 2), (8, 2), (8, 2), (8, 2), (8, 2)]
    """
    order = torch.randperm(images, generator=generator, device=generator.device).cpu()
    result = []
    for part in order.tensor_split(clients):
        held = round(validation_share * len(part))
        if held >= len(part) or (validation_share > 0 and held == 0):
            raise ValueError(
                f"expected images for {clients} clients with a validation share of "
                f"{validation_share}, got {images}; take fewer clients, more images, or "
                "validation_share=0"
            )
        result.append((part[: len(part) - held], part[len(part) - held :]))
    return result


def train_federated(
    model: nn.Module,
    data: ImageSet | tuple[Tensor, Tensor],
    *,
    generator: torch.Generator,
    federation: Federation | None = None,
    defense: Defense | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> FederatedResult:
    """Train by federated averaging, in place; the weights of the best round stay.

    Clients minimise the mean cross-entropy and what stochastic layers add to it. Buffers such as
    running statistics are averaged like weights. The best round is that of the lowest validation
    cross-entropy, over all clients' validation images; without validation it is the last.

    Args:
        model: logits (images, classes) from images; changed in place.
        data: an image set, or images (images, channels, height, width) and labels (images,).
        generator: source of the split, of the orders of images and of all noise; advanced.
        federation: how the clients train; None is the published settings.
        defense: transforms what a client releases, with a victim axis of one; see
            `Federation.defend`. The noise of a client and a round is independent of all others.
        checkpoint: file written after each round under a temporary name and renamed. If it exists
            the run goes on from it, provided that everything is what the first run started with.
        progress: show a bar with the time left.

    Returns:
        The history, the best round and the sizes of the clients.

    Raises:
        ValueError: bad settings or data, a defense that does not fit, or a checkpoint that is
            damaged or of another run.
        OSError: the folder of the checkpoint cannot be made or written.
        FloatingPointError: a loss is no longer finite.
    """
    federation = federation or Federation()
    seen = checked_images(data, "data")
    make_optimiser(model, federation.optimiser, federation.lr)  # refuses a frozen model in time
    path = None if checkpoint is None else Path(checkpoint)
    settings: dict[str, Any] = {}
    if path is not None:
        prepare_folder(path.parent)
        settings = {name: value for name, value in asdict(federation).items() if name != "rounds"}
        settings |= {
            "defense": None if defense is None else repr(defense),
            "data": digest(seen.tensors),
            "initial weights": digest(model.state_dict()),
            "generator": digest({"state": generator.get_state()}),
        }
    parts = split_clients(
        len(seen.images), federation.clients, federation.validation_share, generator=generator
    )
    parts = [(t.to(seen.images.device), v.to(seen.images.device)) for t, v in parts]
    clients = [seen.at(training) for training, _ in parts]
    held_out = seen.at(torch.cat([v for _, v in parts])) if federation.validation_share else None
    history: list[dict[str, float]] = []
    best = copy_weights(model)
    if path is not None and (saved := read_checkpoint(path, settings=settings)) is not None:
        _check_rounds(path, len(saved["history"]), federation.rounds)
        model.load_state_dict(saved["model"])
        generator.set_state(saved["generator"])
        history, best = saved["history"], saved["best"]
    batches = federation.local_epochs * sum(
        math.ceil(len(client.images) / federation.batch_size) for client in clients
    )
    bar = tqdm(
        initial=len(history) * batches, total=federation.rounds * batches, unit="batch",
        disable=not progress,
    )  # fmt: skip
    with bar, mode(model, training=True), torch.enable_grad():
        while not finished(history, federation):
            bar.set_description(f"round {len(history) + 1} of {federation.rounds}")
            lr = learning_rate(history, federation)
            row = {"round": len(history) + 1, "lr": lr}
            row |= _one_round(model, clients, federation, lr, defense, generator, bar)
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"loss {row['loss']} in round {row['round']}: lower lr={federation.lr}"
                )
            if held_out is not None:
                with global_seed(_draw_seed(generator), device_of(model)):
                    accuracy, loss = measure(model, held_out)
                row |= {"validation_loss": loss, "validation_accuracy": accuracy}
            history.append(row)
            if held_out is None or best_round(history) == len(history):
                best = copy_weights(model)
            bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
            if path is not None:
                content: dict[str, Any] = {
                    "model": copy_weights(model),
                    "best": best,
                    "generator": generator.get_state(),
                    "history": history,
                }
                write_checkpoint(path, content, settings=settings)
    model.load_state_dict(best)
    model.zero_grad()
    return FederatedResult(
        history=pd.DataFrame(history),
        best_round=best_round(history) if held_out is not None else len(history),
        client_images=tuple(len(client.images) for client in clients),
    )


def _one_round(
    model: nn.Module,
    clients: Sequence[LabelledImages],
    federation: Federation,
    lr: float,
    defense: Defense | None,
    generator: torch.Generator,
    bar: tqdm,
) -> dict[str, float]:
    """Every client's local training from the same weights, then the average."""
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in start.items()}
    total = sum(len(client.images) for client in clients)
    measured = {"loss": 0.0, "accuracy": 0.0}
    for client in clients:
        model.load_state_dict(start)
        seed = _draw_seed(generator)
        defend = None if defense is None else defended_steps(defense, seed, device_of(model))
        local = defend if federation.defend == "gradients" else None
        steps = make_optimiser(model, federation.optimiser, lr)
        with global_seed(seed, device_of(model)):
            for _ in range(federation.local_epochs):
                row = one_epoch(
                    model, client, steps, federation.batch_size, generator, bar, local
                )
        share = len(client.images) / total
        for name in measured:
            measured[name] += share * row[name]
        after = dict(model.state_dict())
        if defend is not None and federation.defend == "upload":
            after |= _released(model, start, defend, len(client.images))
        for name, tensor in after.items():
            mean[name] += share * tensor.double()
    # counts of batches are whole numbers, which a sum of shares meets up to rounding
    mean = {n: t if start[n].is_floating_point() else t.round() for n, t in mean.items()}
    model.load_state_dict({n: t.to(start[n].dtype) for n, t in mean.items()})
    return measured


def _released(model: nn.Module, start: State, defend: Defend, images: int) -> State:
    """The weights that the server takes a client for: θ minus the released update."""
    update = {
        name: start[name] - parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {name: start[name] - delta for name, delta in defend(update, images).items()}


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


def _check_rounds(path: Path, done: int, rounds: int) -> None:
    if done > rounds:
        raise ValueError(
            f"{path} is already at round {done}, beyond rounds={rounds}: ask for at least {done}, "
            "or name another file"
        )
