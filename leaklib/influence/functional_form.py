"""Products with J by `torch.func`: many vectors and many victims in one call.

Small networks are bound by the number of kernels started, not by arithmetic; `vmap` over vectors
and victims is what pays there, and on a GPU. All derivatives are reverse ones, so every network
that can be differentiated twice is served, whether or not it knows forward mode; measured, forward
over reverse is no faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, vjp, vmap

from leaklib.influence.graph_form import retained_graph
from leaklib.influence.objective import Objective, Parameters

Pull = Callable[[Tensor], Parameters]
# Victims and vectors stand in front: (victims, vectors, ...) in, (victims, vectors, ...) out.
Product = Callable[[Tensor, Tensor, Parameters], Parameters]

# More (victim, vector) pairs at once than this gain nothing on a CPU core (measured on a LeNet).
CPU_PAIRS = 256
CPU_BYTES = 2**30
GPU_SHARE = 0.5


def gradient(objective: Objective, inputs: Tensor, labels: Tensor, *, chunk: int) -> Parameters:
    """Gradients g = ∇θ L of every victim: name -> (victims, *shape)."""
    one = vmap(lambda x, y: grad(objective.value)(objective.params, x, y))
    parts = [one(x, y) for x, y in zip(inputs.split(chunk), labels.split(chunk), strict=True)]
    return {n: torch.cat([part[n] for part in parts]) for n in objective.params}


def jv(objective: Objective) -> Product:
    """Jv = ∇x ⟨∇θ L, v⟩ of one victim: v is name -> (vectors, *shape)."""

    def product(x: Tensor, y: Tensor, v: Parameters) -> Parameters:
        pull = vjp(lambda z: grad(objective.value)(objective.params, z, y), x)[1]
        return {"x": vmap(lambda w: pull(w)[0])(v)}

    return product


def jtu(objective: Objective) -> Product:
    """Jᵀu = ∇θ ⟨∇x L, u⟩ of one victim: u is (vectors, batch, *input shape) under the name "x"."""

    def product(x: Tensor, y: Tensor, u: Parameters) -> Parameters:
        return vmap(_transposed(objective, x, y))(u["x"])

    return product


def gram_product(objective: Objective) -> Product:
    """JJᵀu of one victim, u under the name "x"; no Jᵀu outlives its chunk."""

    def product(x: Tensor, y: Tensor, u: Parameters) -> Parameters:
        transposed = _transposed(objective, x, y)
        pull = vjp(lambda z: grad(objective.value)(objective.params, z, y), x)[1]
        return {"x": vmap(lambda w: pull(transposed(w))[0])(u["x"])}

    return product


def _transposed(objective: Objective, x: Tensor, y: Tensor) -> Pull:
    pull = vjp(lambda p: grad(objective.value, argnums=1)(p, x, y), objective.params)[1]
    return lambda w: pull(w)[0]


def apply_product(
    product: Product, inputs: Tensor, labels: Tensor, vectors: Parameters, *, chunk: int
) -> Parameters:
    """A product of every victim with its vectors, at most `chunk` (victim, vector) pairs at once.

    Args:
        product: one of the above.
        inputs: (victims, batch, *input shape).
        labels: (victims, batch, ...).
        vectors: name -> (victims, vectors, ...).
        chunk: pairs in one `vmap`; sets memory, not the answer.

    Returns:
        name -> (victims, vectors, ...).
    """
    count = next(iter(vectors.values())).shape[1]
    width = min(count, chunk)
    rows = []
    for some in torch.arange(len(inputs)).split(max(1, chunk // width)):
        columns = []
        for start in range(0, count, width):
            part = {n: v[some, start : start + width] for n, v in vectors.items()}
            if len(some) == 1:
                # without the outer vmap every kernel is a plain one
                one = {n: v[0] for n, v in part.items()}
                out = product(inputs[some[0]], labels[some[0]], one)
                columns.append({n: o[None] for n, o in out.items()})
            else:
                columns.append(vmap(product)(inputs[some], labels[some], part))
        rows.append({n: _join([c[n] for c in columns], dim=1) for n in columns[0]})
    return {n: _join([row[n] for row in rows], dim=0) for n in rows[0]}


def _join(parts: list[Tensor], *, dim: int) -> Tensor:
    # no copy of one part: it may be parameter-sized
    return torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]


def pair_bytes(objective: Objective, x: Tensor, y: Tensor) -> int:
    """Memory that one (victim, vector) pair takes in a product, estimated.

    All that the retained graph saves, once more for the vector's own derivatives, and twice the
    parameters. Cost: one gradient evaluation and a third.
    """
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        retained_graph(objective, x, y)
    known = {p.untyped_storage().data_ptr() for p in objective.params.values()}
    params = sum(p.numel() * p.element_size() for p in objective.params.values())
    return 2 * params + sum(size for at, size in saved.items() if at not in known)


def default_chunk(bytes_of_a_pair: int, device: torch.device) -> int:
    """(victim, vector) pairs that fit: half of a GPU's free memory, or 1 GiB elsewhere."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, int(free * GPU_SHARE) // bytes_of_a_pair)
    return max(1, min(CPU_PAIRS, CPU_BYTES // bytes_of_a_pair))
