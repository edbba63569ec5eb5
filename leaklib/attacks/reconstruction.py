"""What an attack returns, and the choice among restarts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """What the attacker believes the private batches to be.

    Args:
        images: (victims, batch, channels, height, width), pixels; unboxed attacks may leave [0, 1].
        labels: (victims, batch), int64.
        objective: the attack's own objective per victim (victims,); 0 for closed forms.
        evaluations: gradient evaluations spent per victim, all restarts together (victims,).
        frames: (snapshots, victims, batch, channels, height, width) or None: the best image of the
            chosen restart at each snapshot.
        history: (ticks, victims) best objective of the chosen restart, or None.
        history_evaluations: (ticks, victims) its evaluations, or None.
        restart: index of the chosen restart (victims,), or None.
    """

    images: Tensor
    labels: Tensor
    objective: Tensor
    evaluations: Tensor
    frames: Tensor | None = None
    history: Tensor | None = None
    history_evaluations: Tensor | None = None
    restart: Tensor | None = None


def choose_restart(objective: Tensor, restarts: int) -> Tensor:
    """Rows of the restart with the lowest objective, one per victim.

    The truth has no part in it: an attacker cannot see it.

    Args:
        objective: (victims * restarts,), rows of a victim adjacent.
        restarts: restarts per victim.

    Returns:
        Row indices (victims,).
    """
    by_victim = objective.view(-1, restarts)
    best = by_victim.argmin(dim=1)
    return best + restarts * best.new_tensor(range(len(by_victim)))
