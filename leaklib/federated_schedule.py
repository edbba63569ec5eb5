"""When a federated run lowers its learning rate, which round is its best and when it ends.

All three are functions of the rounds so far, so a run that goes on from a checkpoint needs no
counters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from leaklib.training_steps import OPTIMISERS


@dataclass(frozen=True)
class Federation:
    """How the clients train.

    The published code halves a client's learning rate after 15 local epochs without improvement,
    but forgets the count with every round, so that one epoch a round never gets there. Here rounds
    are counted; lr_patience=0 keeps the rate.

    Args:
        clients: parts of the data, drawn at random, equal but for one image.
        rounds: at most.
        local_epochs: passes of a client over its images in one round.
        batch_size: images a local step.
        lr: learning rate of the clients' first rounds.
        optimiser: "adam" or "sgd"; its state starts anew in every round.
        validation_share: of each client's images, only measured; 0 turns off what needs it, the
            plateau, the early stop and the choice of the best round.
        lr_patience: rounds without a lower validation loss after which the rate is multiplied by
            `lr_factor`, again after as many; 0 never.
        lr_factor: in (0, 1].
        stop_patience: rounds without a lower validation loss after which training ends; 0 never.
        defend: "gradients" transforms the gradient of each local step, "upload" the update θ − θ_c.
    """

    clients: int = 10
    rounds: int = 300
    local_epochs: int = 1
    batch_size: int = 64
    lr: float = 1e-3
    optimiser: str = "adam"
    validation_share: float = 0.1
    lr_patience: int = 15
    lr_factor: float = 0.5
    stop_patience: int = 40
    defend: Literal["gradients", "upload"] = "gradients"

    def __post_init__(self) -> None:
        if min(self.clients, self.rounds, self.local_epochs, self.batch_size) < 1:
            raise ValueError(
                "expected clients, rounds, local_epochs and batch_size >= 1, got "
                f"{self.clients}, {self.rounds}, {self.local_epochs}, {self.batch_size}"
            )
        if not 0 < self.lr < math.inf or not 0 < self.lr_factor <= 1:
            raise ValueError(
                f"expected finite lr > 0 and 0 < lr_factor <= 1, got {self.lr}, {self.lr_factor}"
            )
        if min(self.lr_patience, self.stop_patience) < 0 or not 0 <= self.validation_share < 1:
            raise ValueError(
                "expected lr_patience, stop_patience >= 0 and validation_share in [0, 1), got "
                f"{self.lr_patience}, {self.stop_patience}, {self.validation_share}"
            )
        if self.optimiser not in OPTIMISERS or self.defend not in ("gradients", "upload"):
            raise ValueError(
                f"expected an optimiser among {', '.join(OPTIMISERS)} and defend='gradients' or "
                f"'upload', got {self.optimiser!r} and {self.defend!r}"
            )


def best_round(history: Sequence[dict[str, float]]) -> int:
    """The round, from 1, of the lowest validation loss; the first of equal ones."""
    losses = [row["validation_loss"] for row in history]
    return 1 + losses.index(min(losses))


def learning_rate(history: Sequence[dict[str, float]], federation: Federation) -> float:
    """The next round's: lowered for every `lr_patience` rounds in a row without improvement."""
    if not history or "validation_loss" not in history[0] or not federation.lr_patience:
        return federation.lr
    lowest, waited, lowered = math.inf, 0, 0
    for row in history:
        improved = row["validation_loss"] < lowest
        lowest, waited = (row["validation_loss"], 0) if improved else (lowest, waited + 1)
        if waited == federation.lr_patience:
            waited, lowered = 0, lowered + 1
    return federation.lr * federation.lr_factor**lowered


def finished(history: Sequence[dict[str, float]], federation: Federation) -> bool:
    """Whether the rounds, or the patience with the validation loss, are spent."""
    if len(history) >= federation.rounds:
        return True
    if not history or "validation_loss" not in history[0] or not federation.stop_patience:
        return False
    return len(history) - best_round(history) >= federation.stop_patience
