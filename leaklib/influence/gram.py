"""The Gram matrix K = JJᵀ of the gradient's Jacobian, exact, and the rows of J themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

from leaklib.gradients.client import VMAP_PARAMETERS
from leaklib.influence.ghost import Features, ghost_features
from leaklib.influence.ghost_plan import make_plan
from leaklib.influence.gram_blocks import (
    Rows,
    blocked_gram,
    check_directions,
    take_directions,
    working_memory,
)
from leaklib.influence.operator import InfluenceOperator
from leaklib.precision import full_float32

Method = Literal["auto", "ghost", "dense"]

# Directions in one pass, over all victims: beyond, a CPU core only loses its cache.
LANES_CPU, LANES_GPU = 128, 4096

# Measured on ResNet-18: what the pass allocates per direction, in what its layers exchange.
PASS_OVERHEAD = 3


@full_float32()
def gram_matrix(
    operator: InfluenceOperator,
    *,
    directions: Tensor | None = None,
    method: Method = "auto",
    chunk: int | None = None,
    memory: int | None = None,
) -> Tensor:
    """K_uv = ⟨Jᵀu, Jᵀv⟩ over all pairs of input directions; K = JJᵀ without directions.

    "ghost" contracts activations layer by layer and never holds a vector of parameter size, but
    for parameters outside Linear, Conv1d-3d (zero padding), BatchNorm in eval mode and GroupNorm:
    those, and layers that are called twice or share a weight, get their part of Jᵀu by autograd.
    "dense" forms Jᵀu. Both are exact; "auto" is "ghost", unless an operation of the network has no
    forward-mode derivative. One block of directions is held, the others stream past it in chunks,
    so memory does not grow with k: beyond what it can hold, the pass is repeated, for k directions
    in n blocks (n + 1)/2 times.

    Cost: 2/3 of a gradient evaluation per direction and the contractions (`ghost_layers.costs`);
    measured in all 0.7 to 1 evaluation on ResNet-18 for 64 directions, 0.2 on LeNet for all 784.

    Args:
        operator: J of the victims; its dtype is that of the computation. Float32 loses what lies
            below 1e-7 of the largest eigenvalue.
        directions: (victims, k, d); None is the identity, k = d.
        method: "auto", "ghost" or "dense".
        chunk: directions in one pass; None chooses by memory.
        memory: bytes to work in, about; None is a quarter of the machine's, or half of what the
            GPU has free.

    Returns:
        (victims, k, k), symmetric to the last bit.

    Raises:
        ValueError: directions of another shape, dtype or device, an unknown method, or a size
            below 1.
        RuntimeError: "ghost" met an operation without a forward-mode derivative.

    Source: Zhang et al. 2023, Eq. 4 (the K that I²F inverts); the contraction is derived here.

    >>> from torch import nn
    >>> from leaklib.influence.operator import influence_operator
    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> half_square = lambda outputs, labels, reduction: outputs.square().sum() / 2
    >>> x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    >>> _ = nn.init.constant_(model.weight, 0.0)  # g = (w·x) x, so J = (w·x) I + w xᵀ
    >>> model.weight.data[0, 0] = 1.0
    >>> y = torch.zeros(1, 1, dtype=torch.int64)
    >>> gram_matrix(influence_operator(model, x, y, loss=half_square))
    tensor([[[52., 12.],
             [12.,  9.]]], dtype=torch.float64)
    """
    k = check_directions(operator, directions, chunk=chunk, memory=memory)
    if method not in ("auto", "ghost", "dense"):
        raise ValueError(f'expected method "auto", "ghost" or "dense", got {method!r}')
    memory = memory or working_memory(operator.device)
    if method == "dense":
        return _dense(operator, directions, k, chunk, memory)
    try:
        with _strict_batching():
            return _ghost(operator, directions, k, chunk, memory, vectorised=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, UserWarning) as error:
        refused = error
    try:
        result = _ghost(operator, directions, k, chunk, memory, vectorised=False)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if method == "ghost":
            raise RuntimeError(
                "expected operations with a forward-mode derivative, got one without "
                f'({_first_line(error)}); use method="dense"'
            ) from error
        warnings.warn(
            f"an operation of the network has no forward-mode derivative ({_first_line(error)}): "
            "J is formed row by row, about 3 gradient evaluations each",
            RuntimeWarning,
            stacklevel=3,
        )
        return _dense(operator, directions, k, chunk, memory)
    warnings.warn(
        f"an operation of the network cannot be batched over directions ({_first_line(refused)}): "
        "they run one at a time, which is several times slower on small networks",
        RuntimeWarning,
        stacklevel=3,
    )
    return result


@full_float32()
def jacobian_rows(
    operator: InfluenceOperator,
    *,
    directions: Tensor | None = None,
    chunk: int | None = None,
    limit: int = 2**31,
) -> Tensor:
    """Jᵀu of every direction u, flattened in the order of `parameter_shapes`; J without any.

    Cost: 1.3 to 3.6 gradient evaluations per direction.

    Args:
        operator: J of the victims.
        directions: (victims, k, d); None is the identity, k = d.
        chunk: directions at a time; None chooses by memory.
        limit: bytes of the result above which to refuse.

    Returns:
        (victims, k, p).

    Raises:
        ValueError: directions of another shape, dtype or device, or a result above the limit.
    """
    k = check_directions(operator, directions, chunk=chunk)
    size = operator.victims * k * operator.parameters * operator.dtype.itemsize
    if size > limit:
        raise ValueError(
            f"expected rows of at most {limit / 2**20:.0f} MiB, got {operator.victims} x {k} x "
            f"{operator.parameters} entries, {size / 2**20:.0f} MiB; pass fewer directions, raise "
            "the limit, or use gram_matrix, which does not form them"
        )
    chunk = chunk or _dense_chunk(operator, k, working_memory(operator.device))
    result = torch.empty(
        operator.victims, k, operator.parameters, dtype=operator.dtype, device=operator.device
    )
    for i in range(operator.victims):
        rows = _dense_rows(operator, directions, i)
        for start in range(0, k, chunk):
            part = slice(start, min(start + chunk, k))
            result[i, part] = rows(part)[0][0][0]
    return result


def _ghost(
    operator: InfluenceOperator,
    directions: Tensor | None,
    k: int,
    chunk: int | None,
    memory: int,
    *,
    vectorised: bool,
) -> Tensor:
    """K from activations, the victims of a small network several at a time."""
    plan = make_plan(operator, directions=k)
    compute = ghost_features(operator, plan, vectorised=vectorised)
    each = operator.dtype.itemsize
    lanes = LANES_GPU if operator.device.type == "cuda" else LANES_CPU
    room = max(1, memory // 4 // (PASS_OVERHEAD * max(1, plan.carried) * each))
    chunk = chunk or min(k, lanes, room)
    small = operator.device.type == "cuda" or operator.parameters <= VMAP_PARAMETERS
    group = max(1, min(lanes, room) // chunk) if small and vectorised else 1
    result = []
    for first in range(0, operator.victims, group):
        some = slice(first, min(first + group, operator.victims))
        count = some.stop - some.start
        block = memory // 2 // max(1, plan.held * each * count)

        def rows(part: slice, some: slice = some) -> Features:
            u = take_directions(operator, directions, some, part)
            x, y = operator.inputs[some], operator.labels[some]
            with torch.no_grad():
                if len(x) > 1:
                    return vmap(compute)(x, y, u)
                held, streamed = compute(x[0], y[0], u[0])
            return [h[None] for h in held], [s[None] for s in streamed]

        result.append(
            blocked_gram(rows, victims=count, k=k, chunk=chunk, block=block, like=operator.inputs)
        )
    return torch.cat(result)


def _dense(
    operator: InfluenceOperator, directions: Tensor | None, k: int, chunk: int | None, memory: int
) -> Tensor:
    """K from the rows of J, one victim at a time."""
    chunk = chunk or _dense_chunk(operator, k, memory)
    block = memory // 2 // (operator.parameters * operator.dtype.itemsize)
    result = []
    for i in range(operator.victims):
        rows = _dense_rows(operator, directions, i)
        result.append(
            blocked_gram(rows, victims=1, k=k, chunk=chunk, block=block, like=operator.inputs)
        )
    return torch.cat(result)


def _dense_chunk(operator: InfluenceOperator, k: int, memory: int) -> int:
    """Rows of J to form at a time."""
    room = memory // 4 // (PASS_OVERHEAD * operator.parameters * operator.dtype.itemsize)
    return max(1, min(k, LANES_CPU, room))


def _dense_rows(operator: InfluenceOperator, directions: Tensor | None, victim: int) -> Rows:
    """Rows of J of one victim as features: K_uv = ⟨Jᵀu, Jᵀv⟩."""
    some = slice(victim, victim + 1)
    one = operator.select([victim])

    def rows(part: slice) -> Features:
        tangents = one.jtu(take_directions(operator, directions, some, part))
        flat = torch.cat([tangents[n].flatten(2) for n in one.parameter_shapes], dim=2)
        return [flat], [flat]

    return rows


@contextmanager
def _strict_batching() -> Iterator[None]:
    """An operation that `vmap` would run in a silent loop is an error inside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
