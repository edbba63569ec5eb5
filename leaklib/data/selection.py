"""Which pictures of a split: the first n, a seeded draw, a balanced choice, or given indices."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch

from leaklib.data.sources import ImageSource


def choose_positions(
    source: ImageSource,
    what: str,
    *,
    n: int | None = None,
    indices: Iterable[int] | None = None,
    seed: int | None = None,
    balanced: bool = False,
) -> list[int]:
    """Return the positions in `source` of the pictures asked for; see `data.load_images`.

    Args:
        source: An opened split.
        what: Its name, for messages.
        n: Number of pictures; without it and without `indices`, all of them.
        indices: Positions in the original split.
        seed: Seed of a draw of `n` without replacement.
        balanced: Take classes in turn, so that their counts differ by one at most.

    Raises:
        TypeError: A number is not whole.
        ValueError: A number is out of range or given twice, or arguments exclude each other.
    """
    population = len(source.labels)
    if indices is not None:
        if n is not None or seed is not None or balanced:
            raise ValueError("expected either indices or n (with seed, balanced), got both")
        return _positions_of(source, what, [_whole(index, "indices") for index in indices])
    if n is None:
        if seed is not None or balanced:
            raise ValueError("expected n with seed or balanced, got none; pass n, the number drawn")
        return list(range(population))
    if not 1 <= _whole(n, "n") <= population:
        raise ValueError(f"expected n from 1 to {population}, the pictures of {what} here, got {n}")
    blocks = source.blocks or (torch.arange(population),)
    if seed is not None:
        generator = torch.Generator().manual_seed(_whole(seed, "seed"))
        blocks = tuple(block[torch.randperm(len(block), generator=generator)] for block in blocks)
    order: list[int] = torch.cat(blocks).tolist()
    return _in_turn(source, what, order, n) if balanced else order[:n]


def _whole(value: int, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"expected whole numbers for {name}, got {value!r}; pass int") from None


def _in_turn(source: ImageSource, what: str, order: list[int], n: int) -> list[int]:
    """Take the first picture of each class, then the second of each, and so on."""
    labels = source.labels.tolist()
    taken = [0] * len(source.class_names)
    turn: dict[int, int] = {}
    for position in order:
        turn[position] = taken[labels[position]]
        taken[labels[position]] += 1
    if -(-n // len(taken)) > min(taken):
        raise ValueError(
            f"expected n <= {min(taken) * len(taken)} for a balanced choice from {what}, got "
            f"{n}; its smallest class has {min(taken)} pictures"
        )
    return sorted(order, key=turn.__getitem__)[:n]


def _positions_of(source: ImageSource, what: str, indices: list[int]) -> list[int]:
    if not indices:
        raise ValueError("expected at least one index, got none")
    position_of = {index: position for position, index in enumerate(source.indices.tolist())}
    seen: set[int] = set()
    for index in indices:
        if index not in position_of:
            there = source.holds or f"indices 0 to {len(position_of) - 1}"
            raise ValueError(f"expected indices of {what}, which has {there}; got {index}")
        if index in seen:
            raise ValueError(f"expected every index once, got {index} twice; list it once")
        seen.add(index)
    return [position_of[index] for index in indices]
