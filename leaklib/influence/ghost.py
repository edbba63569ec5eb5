"""Features of the Gram matrix K = JJᵀ without parameter-sized vectors: one forward-mode pass.

The pass maps the private input x to every layer's input a and output gradient k = ∂L/∂z, the
latter as the derivative with respect to a zero that is added to the layer's output. Its tangent
along a direction needs one forward and one backward pass without any weight gradient: two thirds
of a gradient evaluation. Parameters that are not a plain layer's get their rows of Jᵀ themselves,
by forward over reverse in the same pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from leaklib.influence.ghost_layers import features
from leaklib.influence.ghost_plan import Plan, hooked
from leaklib.influence.operator import InfluenceOperator

Tensors = dict[str, Tensor]
Features = tuple[list[Tensor], list[Tensor]]


def ghost_features(
    operator: InfluenceOperator, plan: Plan, *, vectorised: bool = True
) -> Callable[[Tensor, Tensor, Tensor], Features]:
    """The map (x, y, u) -> features with K_uv = Σ ⟨held_u, streamed_v⟩, of one victim.

    Cost: 2/3 of a gradient evaluation per direction, and the contractions of `costs`.

    Args:
        operator: J of the victims.
        plan: how each shared parameter enters.
        vectorised: all directions in one `vmap`, or one after another.

    Returns:
        A function of x (batch, *input shape), labels and u (directions, d); two lists of
        (directions, entries). Safe under `vmap`.
    """
    activations = _activations(operator, plan)
    _load_forward_mode()

    def compute(x: Tensor, y: Tensor, u: Tensor) -> Features:
        def along(v: Tensor) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
            if y.is_floating_point():
                # torch's forward rule of mse_loss fails on a target without a tangent
                return cast(Any, jvp(activations, (x, y), (v, torch.zeros_like(y))))
            return cast(Any, jvp(lambda z: activations(z, y), (x,), (v,)))

        u = u.unflatten(-1, x.shape)
        if vectorised:
            # The primal values come back expanded along the directions: a view, not a copy.
            here, moved = vmap(along)(u)
            here = {kind: {n: v[0] for n, v in group.items()} for kind, group in here.items()}
        else:
            parts = [along(v) for v in u]
            here = parts[0][0]
            moved = {
                kind: {n: torch.stack([part[1][kind][n] for part in parts]) for n in group}
                for kind, group in here.items()
            }
        small = [value.flatten(1) for value in moved["small"].values()]
        held, streamed = list(small), list(small)
        for name, layer in plan.matrix.items():
            h, s = features(
                layer, here["inputs"][name], here["gradients"][name],
                moved["inputs"].pop(name), moved["gradients"].pop(name),
            )  # fmt: skip
            held += h
            streamed += s
        return held, streamed

    return compute


@cache
def _load_forward_mode() -> None:
    """Torch scripts its forward rules at the first use and calls its own scripting deprecated."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def _activations(
    operator: InfluenceOperator, plan: Plan
) -> Callable[[Tensor, Tensor], dict[str, Tensors]]:
    """(x, y) -> inputs and output gradients of all layers, and the gradients that are formed."""
    params = {n: p for n, p in operator.objective.params.items() if n not in plan.generic}
    loose = {n: operator.objective.params[n] for n in plan.generic}
    modules = {n: m for n, m in operator.model.named_modules() if n in plan.outputs}

    def loss(zeros: Tensors, free: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensors]:
        inputs: Tensors = {}

        def note(name: str, module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
            inputs[name] = normalised(module, value) if name in plan.scale else value
            return output + zeros[name]

        with hooked(modules, note):
            return operator.objective.value(params | free, x, y), inputs

    def evaluate(x: Tensor, y: Tensor) -> dict[str, Tensors]:
        zeros = {n: x.new_zeros(shape) for n, shape in plan.outputs.items()}
        (gradients, small), inputs = grad(loss, argnums=(0, 1), has_aux=True)(zeros, loose, x, y)
        for name, own in plan.scale.items():
            k, normal = gradients.pop(name), inputs.pop(name)
            rest = [i for i in range(k.ndim) if i != 1]
            if "weight" in own:
                small[f"{name}.weight"] = (k * normal).sum(rest)
            if "bias" in own:
                small[f"{name}.bias"] = k.sum(rest)
        return {"inputs": inputs, "gradients": gradients, "small": small}

    return evaluate


def normalised(module: nn.Module, value: Tensor) -> Tensor:
    """What a normalisation layer scales: its input, centred and divided."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(value, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    shape = (1, -1) + (1,) * (value.ndim - 2)
    scale = (module.running_var + module.eps).rsqrt()
    return (value - module.running_mean.view(shape)) * scale.view(shape)
