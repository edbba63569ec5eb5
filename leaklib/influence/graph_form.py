"""Products with J on one retained graph of forward and backward: single vectors, large networks.

The forward pass and the first backward pass are done once; each product is then one pass through
the graph that both left behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from leaklib.influence.objective import Objective, Parameters


@dataclass(frozen=True, eq=False)
class RetainedGraph:
    """The graph of (∇x L, ∇θ L) of one victim. Vectors come in a mapping with a leading axis.

    Attributes:
        x: the leaf (batch, *input shape).
        params: the leaves θ.
        input_gradient: ∇x L, shape of x.
        gradient: where in the graph g = ∇θ L arises, without its values, which no product needs
            and which are as large as the network. A parameter whose gradient does not depend on x
            at all, like a bias' under a loss linear in the outputs, has no place.
    """

    x: Tensor
    params: Parameters
    input_gradient: Tensor
    gradient: dict[str, GradientEdge]

    def jv(self, v: Parameters) -> Parameters:
        """Jv = ∇x ⟨g, v⟩: name -> (vectors, *shape) to "x" -> (vectors, batch, *input shape)."""
        count = len(next(iter(v.values())))
        return {"x": torch.stack([self._jv({n: t[i] for n, t in v.items()}) for i in range(count)])}

    def jtu(self, u: Parameters) -> Parameters:
        """Jᵀu = ∇θ ⟨∇x L, u⟩, as mixed derivatives commute: "x" to name -> (vectors, *shape)."""
        parts = [self._jtu(one) for one in u["x"]]
        return {n: stack([part[n] for part in parts]) for n in self.params}

    def gram_product(self, u: Parameters) -> Parameters:
        """JJᵀu; one Jᵀu lives at a time."""
        return {"x": torch.stack([self._jv(self._jtu(one)) for one in u["x"]])}

    def _jv(self, v: Parameters) -> Tensor:
        if not self.gradient:
            return torch.zeros_like(self.x)
        (result,) = torch.autograd.grad(
            list(self.gradient.values()), self.x, [v[n] for n in self.gradient],
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        return result

    def _jtu(self, u: Tensor) -> Parameters:
        if not self.input_gradient.requires_grad:
            return {n: torch.zeros_like(p) for n, p in self.params.items()}
        parts = torch.autograd.grad(
            self.input_gradient, list(self.params.values()), u,
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        return dict(zip(self.params, parts, strict=True))


def stack(parts: list[Tensor]) -> Tensor:
    """`torch.stack` that copies nothing where there is one part: parameters may be large."""
    return torch.stack(parts) if len(parts) > 1 else parts[0][None]


def retained_graph(objective: Objective, x: Tensor, y: Tensor) -> RetainedGraph:
    """Forward and first backward pass of one victim, kept for as many products as wanted.

    Cost: about one gradient evaluation and a third; memory of at most two training steps.
    """
    x = x.detach().requires_grad_()
    params = {n: p.detach().requires_grad_() for n, p in objective.params.items()}
    with torch.enable_grad():
        value = objective.value(params, x, y)
        input_gradient, *gradient = torch.autograd.grad(
            value, [x, *params.values()], create_graph=True, materialize_grads=True
        )
    places = zip(params, gradient, strict=True)
    edges = {n: get_gradient_edge(g) for n, g in places if g.requires_grad}
    return RetainedGraph(x, params, input_gradient, edges)


def gradient(objective: Objective, x: Tensor, y: Tensor) -> Parameters:
    """Gradient g = ∇θ L of one victim, without any graph. Cost: one gradient evaluation."""
    params = {n: p.detach().requires_grad_() for n, p in objective.params.items()}
    with torch.enable_grad():
        value = objective.value(params, x.detach(), y)
    parts = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
    return dict(zip(params, parts, strict=True))
