"""Runs an optimiser to its budget: progress, snapshots, history, checkpoint and resumption."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from leaklib.checkpoint import read_checkpoint, write_checkpoint
from leaklib.files import prepare_folder
from leaklib.precision import full_float32


class OptimiserState(Protocol):
    """What the driver needs to know of an optimiser."""

    active: Tensor
    evaluations: Tensor

    @property
    def best_x(self) -> Tensor:
        """Best iterates (rows, size)."""

    @property
    def best_value(self) -> Tensor:
        """Their objectives (rows,)."""


State = TypeVar("State", bound=OptimiserState)


@dataclass(frozen=True)
class RunSettings:
    """How an attack is run, whatever the attack.

    Args:
        progress: show a progress bar with the time left.
        snapshots: evaluation counts at which the best iterate so far is kept.
        checkpoint: file to save the run to and to resume it from; None for none.
        checkpoint_seconds: time between two saves.
    """

    progress: bool = False
    snapshots: tuple[int, ...] = ()
    checkpoint: Path | None = None
    checkpoint_seconds: float = 30.0


@dataclass
class Trace:
    """What a run leaves beside its result.

    Args:
        frames: (snapshots, rows, size), best iterate at each snapshot; the last one reached is
            repeated for a row that stopped earlier.
        values: best objective of every row after each tick, (ticks, rows).
        evaluations: evaluations of every row after each tick, (ticks, rows).
    """

    frames: Tensor
    values: Tensor
    evaluations: Tensor


@full_float32()
def drive(
    state: State,
    tick: Callable[[State], None],
    *,
    max_evaluations: int,
    settings: RunSettings,
    identity: Mapping[str, Any],
    label: str,
) -> tuple[State, Trace]:
    """Tick until every row has stopped or spent its budget.

    Args:
        state: optimiser state before the first tick; replaced by the checkpoint's if one is there.
        tick: advances the state in place, one evaluation per active row.
        max_evaluations: budget of each row.
        settings: progress, snapshots and checkpoint.
        identity: settings and a digest of the problem; a checkpoint of another one is refused.
        label: name on the progress bar.

    Returns:
        The final state and the trace.

    Raises:
        ValueError: the checkpoint belongs to another run or is damaged.
        OSError: its folder cannot be written.
    """
    if max_evaluations < 1:
        raise ValueError(f"expected max_evaluations >= 1, got {max_evaluations}")
    counts = torch.tensor(settings.snapshots, device=state.best_x.device, dtype=torch.int64)
    frames = state.best_x[None].repeat(len(counts), 1, 1)
    values: list[Tensor] = []
    evaluations: list[Tensor] = []
    path = settings.checkpoint
    identity = {
        **identity,
        "max_evaluations": max_evaluations,
        "snapshots": str(settings.snapshots),
    }
    if path is not None:
        prepare_folder(path.parent)
        if (saved := read_checkpoint(path, settings=identity)) is not None:
            there = {n: t.to(frames.device) for n, t in saved["state"].items()}
            state = replace(state, **there)  # type: ignore[type-var]
            frames = saved["frames"].to(frames.device)
            values, evaluations = list(saved["values"]), list(saved["evaluations"])
    total = max_evaluations * len(state.active)
    last_save = time.monotonic()
    with tqdm(total=total, desc=label, unit="eval", disable=not settings.progress,
              initial=int(state.evaluations.sum())) as bar:  # fmt: skip
        while bool(state.active.any()):
            before = int(state.evaluations.sum())
            tick(state)
            state.active &= state.evaluations < max_evaluations
            values.append(state.best_value.cpu().clone())
            evaluations.append(state.evaluations.cpu().clone())
            # A snapshot follows its row until the row has spent that many evaluations.
            open_frames = counts[:, None] >= state.evaluations
            if bool(open_frames.any()):
                frames[open_frames] = state.best_x.expand_as(frames)[open_frames]
            bar.update(int(state.evaluations.sum()) - before)
            due = time.monotonic() - last_save > settings.checkpoint_seconds
            if path is not None and (due or not bool(state.active.any())):
                _save(path, state, frames, values, evaluations, identity)
                last_save = time.monotonic()
        finished = total - int(state.evaluations.sum())
        bar.update(finished if settings.progress else 0)
    trace = Trace(frames, torch.stack(values), torch.stack(evaluations))
    return state, trace


def snapshot_counts(snapshots: Sequence[int]) -> tuple[int, ...]:
    """Check evaluation counts: non-negative and increasing.

    Raises:
        ValueError: otherwise.
    """
    counts = tuple(int(count) for count in snapshots)
    if any(c < 0 for c in counts) or list(counts) != sorted(set(counts)):
        raise ValueError(f"expected increasing evaluation counts >= 0, got {list(snapshots)}")
    return counts


def _save(
    path: Path,
    state: OptimiserState,
    frames: Tensor,
    values: list[Tensor],
    evaluations: list[Tensor],
    identity: Mapping[str, Any],
) -> None:
    content = {
        "state": {f.name: getattr(state, f.name) for f in fields(state)},  # type: ignore[arg-type]
        "frames": frames,
        "values": torch.stack(values),
        "evaluations": torch.stack(evaluations),
    }
    write_checkpoint(path, content, settings=identity)
