"""Which shared parameters can be contracted from activations, and in which form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leaklib.influence.ghost_layers import (
    CONVOLUTIONS,
    FORMS,
    MatrixLayer,
    costs,
    held_entries,
    matrix_layer,
)
from leaklib.influence.operator import InfluenceOperator

# Exact types: a subclass may use its weights in ways of its own.
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KNOWN = (nn.Linear, *CONVOLUTIONS, *_BATCHNORMS, nn.GroupNorm)

Note = Callable[[str, nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """How each shared parameter enters K.

    Attributes:
        matrix: linear and convolutional layers, contracted from activations.
        scale: BatchNorm and GroupNorm layers, with those of their ("weight", "bias") that are
            shared; their tangents are per channel, so small that they are formed.
        generic: names of all other shared parameters, whose tangents are formed by autograd.
        outputs: layer name -> shape of its output, of all layers above.
        carried: entries that one direction carries through the pass.
        held: entries that one direction keeps for the contractions.
    """

    matrix: dict[str, MatrixLayer]
    scale: dict[str, tuple[str, ...]]
    generic: tuple[str, ...]
    outputs: dict[str, torch.Size]
    carried: int
    held: int


def make_plan(operator: InfluenceOperator, *, directions: int) -> Plan:
    """Sort the shared parameters by layer, and choose the cheapest form of every layer.

    A layer is contracted from its activations when it is of a known type without hooks, is called
    once, and the autograd graph of the loss shows exactly one use of each of its shared
    parameters: tied weights, and weights that are also used outside the layer, show there.

    Cost: one forward pass.

    Args:
        operator: J of the victims; the first stands for all.
        directions: k of the Gram matrix to come.

    Returns:
        The plan.
    """
    leaves = {n: p.detach().requires_grad_() for n, p in operator.objective.params.items()}
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    calls: Counter[str] = Counter()

    def note(name: str, _module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
        calls[name] += 1
        if output.requires_grad:
            shapes[name] = value.shape, output.shape
        return output

    candidates = {n: m for n, m in operator.model.named_modules() if _is_known(m)}
    with hooked(candidates, note), torch.enable_grad():
        loss = operator.objective.value(leaves, operator.inputs[0], operator.labels[0])
    uses = graph_uses(loss, leaves)
    matrix: dict[str, MatrixLayer] = {}
    scale: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for name, module in candidates.items():
        own = {kind: f"{name}.{kind}".removeprefix(".") for kind in ("weight", "bias")}
        own = {kind: n for kind, n in own.items() if n in leaves}
        once = calls[name] == 1 and all(uses[n] == 1 for n in own.values())
        if not own or not once or name not in shapes:
            continue
        if isinstance(module, CONVOLUTIONS) and len(shapes[name][0]) != module.weight.ndim:
            continue  # an input without an axis of samples
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            layer = matrix_layer(module, *shapes[name], weight="weight" in own, bias="bias" in own)
            cost = costs(layer, directions)
            matrix[name] = replace(layer, form=min(FORMS, key=cost.__getitem__))
        else:
            scale[name] = tuple(own)
        taken.update(own.values())
    generic = tuple(n for n in leaves if n not in taken)
    loose = sum(leaves[n].numel() for n in generic)
    used = {n: shapes[n] for n in (*matrix, *scale)}
    return Plan(
        matrix, scale, generic,
        outputs={n: out for n, (_, out) in used.items()},
        carried=loose + sum(a.numel() + k.numel() for a, k in used.values()),
        held=loose + sum(held_entries(layer) for layer in matrix.values()),
    )  # fmt: skip


def _is_known(module: nn.Module) -> bool:
    """A type whose weight gradient is a product of input and output gradient, unaltered."""
    if type(module) not in _KNOWN or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, _BATCHNORMS):
        return not module.training and module.running_mean is not None
    return not isinstance(module, CONVOLUTIONS) or module.padding_mode == "zeros"


@contextmanager
def hooked(modules: Mapping[str, nn.Module], note: Note) -> Iterator[None]:
    """Pass every output of these modules, with its input, through `note` inside."""

    def hook(name: str) -> Callable[[nn.Module, Any, dict[str, Any], Tensor], Tensor]:
        def call(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            return note(name, module, args[0] if args else kwargs["input"], output)

        return call

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def graph_uses(loss: Tensor, leaves: Mapping[str, Tensor]) -> Counter[str]:
    """How many operations of the graph below a value read each leaf."""
    names = {id(p): n for n, p in leaves.items()}
    uses: Counter[str] = Counter()
    queue, met = [loss.grad_fn], {loss.grad_fn}
    while queue:
        node = queue.pop()
        for child, _ in node.next_functions if node is not None else ():
            leaf = getattr(child, "variable", None)
            if leaf is not None and id(leaf) in names:
                uses[names[id(leaf)]] += 1
            elif child is not None and child not in met:
                met.add(child)
                queue.append(child)
    return uses
