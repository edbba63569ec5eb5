"""The attacker's own noise for a stochastic model: fresh at every evaluation, and repeatable."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from leaklib.gradients.stochastic import Noise, noise_shapes

# (rows (k,), number of the evaluation) -> buffer name -> (k, local steps, *shape)
RowNoise = Callable[[Tensor, int], Noise]

# Evaluations from here on score the final iterates: noise that the search has not seen.
SCORING = 2**40

# Numbers drawn at once per row: making a generator costs more than a short draw.
_AHEAD = 2**14


def attacker_noise(
    model: nn.Module, batch: int, *, steps: int = 1, seed: int | None
) -> RowNoise | None:
    """Standard normal noise as a function of (seed, row, evaluation), or None for no noise.

    A counter-based generator (Philox) makes every number a function of its place. So a run that
    goes on from a checkpoint meets the noise that it would have met, and a row's noise does not
    depend on which other rows are searched for, nor on the device.

    Args:
        model: the shared model.
        batch: images per client.
        steps: the client's local steps.
        seed: >= 0; None is refused for a stochastic model.

    Returns:
        The noise of some rows at one evaluation; None for a deterministic model.

    Raises:
        ValueError: a stochastic model without a seed.
    """
    shapes = noise_shapes(model, batch, steps=steps)
    if not shapes:
        return None
    if seed is None:
        raise ValueError(
            f"expected noise_seed for the attacker's noise of {', '.join(shapes)}, got none"
        )
    sizes = [math.prod(shape) for shape in shapes.values()]
    ahead = min(64, max(1, _AHEAD // sum(sizes)))
    like = next(model.parameters())
    blocks: dict[int, tuple[int, Tensor]] = {}

    def numbers_of(row: int, evaluation: int) -> Tensor:
        block = evaluation // ahead
        if row not in blocks or blocks[row][0] != block:
            key = np.array([seed, row], dtype=np.uint64)
            place = np.array([0, 0, 0, block], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key, counter=place))
            drawn = torch.from_numpy(generator.standard_normal((ahead, sum(sizes))))
            blocks[row] = (block, drawn.to(like.dtype))
        return blocks[row][1][evaluation % ahead]

    def noise(rows: Tensor, evaluation: int) -> Noise:
        flat = torch.stack([numbers_of(row, evaluation) for row in rows.tolist()]).to(like.device)
        parts = flat.split(sizes, dim=1)
        return {n: p.reshape(-1, *shapes[n]) for n, p in zip(shapes, parts, strict=True)}

    return noise


def known_noise(noise: Noise, restarts: int) -> RowNoise:
    """Noise that the attacker has found out: the victim's own, the same at every evaluation.

    Args:
        noise: buffer name -> (victims, local steps, *shape), as `recover_noise` gives it.
        restarts: rows a victim.

    Returns:
        The noise of some rows, whatever the evaluation.
    """

    def of_rows(rows: Tensor, _evaluation: int) -> Noise:
        return {name: tensor[rows // restarts] for name, tensor in noise.items()}

    return of_rows


def row_noise(
    model: nn.Module,
    batch: int,
    *,
    steps: int,
    seed: int | None,
    known: Noise | None,
    victims: int,
    restarts: int,
) -> RowNoise | None:
    """The noise that an attack evaluates with: the one it knows, else its own.

    Raises:
        ValueError: known noise of another shape than the model's, or neither noise nor seed.
    """
    if known is None:
        return attacker_noise(model, batch, steps=steps, seed=seed)
    shapes = {n: (victims, *s) for n, s in noise_shapes(model, batch, steps=steps).items()}
    if {n: tuple(tensor.shape) for n, tensor in known.items()} != shapes:
        raise ValueError(
            f"expected noise of shapes {shapes}, got "
            f"{ {n: tuple(tensor.shape) for n, tensor in known.items()} }; recover_noise(model, "
            "shared, ...) gives the right ones"
        )
    return known_noise(known, restarts)
