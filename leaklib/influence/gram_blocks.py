"""Gram matrices by blocks: what is held, what streams past, and how much memory that may take."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from leaklib.influence.ghost import Features
from leaklib.influence.operator import InfluenceOperator

# Some directions -> features with K_uv = Σ ⟨held_u, streamed_v⟩, each (victims, directions, ...).
Rows = Callable[[slice], Features]

# Terms summed in one product: a float32 product over the 11 million parameters of a ResNet-18 was
# measured to be wrong by 2e-3, in pieces by 3e-7.
TERMS = 2**16


def blocked_gram(
    rows: Rows, *, victims: int, k: int, chunk: int, block: int, like: Tensor
) -> Tensor:
    """K from features: a block is held while it and all later directions stream past it.

    Every pair of blocks is met once, in the upper triangle; n blocks ask for (n + 1)/2 times k
    features.

    Args:
        rows: features of some directions.
        victims: leading axis of the features.
        k: number of directions.
        chunk: directions that stream at once.
        block: directions that are held at once, rounded down to whole chunks, at least one.
        like: dtype and device of the result.

    Returns:
        (victims, k, k), symmetric.
    """
    block = max(1, block // chunk) * chunk
    gram = like.new_zeros(victims, k, k)
    for top in range(0, k, block):
        bottom = min(top + block, k)
        kept: list[Tensor] = []
        for start in range(top, k, chunk):
            part = slice(start, min(start + chunk, k))
            held, streamed = rows(part)
            if start < bottom:
                kept = kept or [h.new_empty(victims, bottom - top, h.shape[-1]) for h in held]
                for store, h in zip(kept, held, strict=True):
                    store[:, start - top : part.stop - top] = h
            del held
            seen = slice(top, min(part.stop, bottom))
            for store, s in zip(kept, streamed, strict=True):
                past = store[:, : seen.stop - top]
                for h, t in zip(past.split(TERMS, dim=2), s.split(TERMS, dim=2), strict=True):
                    gram[:, seen, part] += h @ t.mT
    return gram.triu() + gram.triu(1).mT


def take_directions(
    operator: InfluenceOperator, directions: Tensor | None, victims: slice, part: slice
) -> Tensor:
    """Some directions of some victims, (victims, directions, d)."""
    if directions is not None:
        return directions[victims, part]
    u = operator.inputs.new_zeros(part.stop - part.start, operator.unknowns)
    u.diagonal(part.start).fill_(1)
    return u.expand(victims.stop - victims.start, -1, -1)


def check_directions(
    operator: InfluenceOperator,
    directions: Tensor | None,
    *,
    chunk: int | None,
    memory: int | None = None,
) -> int:
    """Number k of directions, d where there are none.

    Raises:
        ValueError: they do not fit the operator, or a size is below 1.
    """
    for name, value in (("chunk", chunk), ("memory", memory)):
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}; None chooses it")
    if directions is None:
        return operator.unknowns
    expected = (operator.victims, operator.unknowns)
    shape = tuple(directions.shape)
    if len(shape) != 3 or (shape[0], shape[2]) != expected or not shape[1]:
        raise ValueError(
            f"expected directions (victims, k, d) = ({expected[0]}, k, {expected[1]}), k >= 1, got "
            f"{shape}; flatten the input's axes, and give every victim its own"
        )
    if directions.dtype != operator.dtype or directions.device != operator.device:
        raise ValueError(
            f"expected directions of the operator's dtype and device ({operator.dtype}, "
            f"{operator.device}), got ({directions.dtype}, {directions.device}); call .to(...)"
        )
    return directions.shape[1]


def working_memory(device: torch.device) -> int:
    """Bytes to work in: half of a GPU's free memory, or a quarter of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, ValueError, OSError):
        return 2**31
