"""The operator J = ∂(∇θ L)/∂x of a network at one or many private inputs, by its products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaklib.gradients.client import VMAP_PARAMETERS, Loss
from leaklib.gradients.payload import Reduction, SharedGradient, match_parameters
from leaklib.influence import checks, functional_form, graph_form
from leaklib.influence.graph_form import RetainedGraph, retained_graph, stack
from leaklib.influence.objective import Objective, explained_failures, private_objective
from leaklib.precision import full_float32

Form = Literal["auto", "graph", "functional"]

# One victim with no more vectors than this is faster on its retained graph, even on a small
# network: the functional form redoes forward and backward pass in every call. Measured on a LeNet,
# JJᵀu: 2.7 ms a vector against 7.0 ms a call and 0.35 ms a vector.
FEW_VECTORS = 3


@dataclass(frozen=True, eq=False)
class InfluenceOperator:
    """J = ∂g/∂x in R^{d x p} of every victim, g = ∇θ L(x, y, θ); row i is ∂g/∂x_i.

    Never materialised: Jv = ∇x ⟨g, v⟩ and Jᵀu = ∇θ ⟨∇x L, u⟩ are second derivatives of the loss.
    A private batch of n with a mean loss has J = [J₁; ...; J_n]/n, so block (i, j) of JJᵀ is
    J_i J_jᵀ/n². Build one with `influence_operator`. Source: Zhang et al. 2023, Eq. 4.

    Attributes:
        model: the network, a copy in eval mode and in the operator's dtype.
        inputs: (victims, batch, *input shape).
        labels: (victims, batch, ...).
        loss: called as loss(outputs, labels, reduction=...).
        reduction: "mean" or "sum" over the batch.
        parameter_shapes: shared parameter name -> shape, in the model's order.
        form: "graph", "functional", or "auto": on a small network, whichever is faster for the
            number of vectors of a call.
        chunk: (victim, vector) pairs at once in the functional form; None goes by memory.
        objective: the loss as a pure function.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    loss: Loss
    reduction: Reduction
    parameter_shapes: dict[str, torch.Size]
    form: Form
    chunk: int | None
    objective: Objective = field(repr=False)
    # The last victim's graph and no other: two would be two training steps of memory.
    _kept: dict[int, RetainedGraph] = field(default_factory=dict, repr=False)

    @property
    def victims(self) -> int:
        """Number of victims."""
        return len(self.inputs)

    @property
    def input_shape(self) -> torch.Size:
        """(batch, *input shape): the d unknowns of one victim."""
        return self.inputs.shape[1:]

    @property
    def unknowns(self) -> int:
        """d, entries of one private batch."""
        return prod(self.input_shape)

    @property
    def parameters(self) -> int:
        """p, entries of all shared parameters."""
        return sum(prod(shape) for shape in self.parameter_shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of every product."""
        return self.inputs.dtype

    @property
    def device(self) -> torch.device:
        """Device of every product."""
        return self.inputs.device

    def select(self, rows: int | slice | Sequence[int] | Tensor) -> InfluenceOperator:
        """The operator of some victims; the victim axis stays.

        Raises:
            ValueError: no victim is left.
        """
        index = torch.arange(self.victims, device=self.device)[rows].reshape(-1)
        if not len(index):
            raise ValueError(f"expected some of {self.victims} victims, got {rows}; name one")
        return replace(self, inputs=self.inputs[index], labels=self.labels[index], _kept={})

    @full_float32()
    def gradient(self) -> dict[str, Tensor]:
        """Gradients g = ∇θ L: name -> (victims, *shape). Cost: one gradient evaluation a victim."""
        with explained_failures():
            if self._by_graph(vectors=1):
                parts = [
                    graph_form.gradient(self.objective, x, y)
                    for x, y in zip(self.inputs, self.labels, strict=True)
                ]
                return {n: stack([part[n] for part in parts]) for n in self.parameter_shapes}
            return functional_form.gradient(
                self.objective, self.inputs, self.labels, chunk=self._pairs()
            )

    @full_float32()
    def jv(self, v: Mapping[str, Tensor] | SharedGradient) -> Tensor:
        """Jv for parameter-sized v, such as a perturbation of the gradient.

        Cost: about 2 gradient evaluations a vector on the graph.

        Args:
            v: name -> (victims, *shape), or (victims, vectors, *shape).

        Returns:
            (victims, vectors, d); vectors is 1 where v has no such axis.

        Raises:
            ValueError: names, shapes, dtype or device that do not fit.
        """
        tensors = checks.parameter_vectors(
            v, shapes=self.parameter_shapes, victims=self.victims, like=self.inputs
        )
        return self._product("jv", tensors)["x"].flatten(2)

    @full_float32()
    def jtu(self, u: Tensor) -> dict[str, Tensor]:
        """Jᵀu for input-sized u. Cost: about 2.5 gradient evaluations a vector on the graph.

        Args:
            u: (victims, vectors, d).

        Returns:
            name -> (victims, vectors, *shape).

        Raises:
            ValueError: shape, dtype or device that do not fit.
        """
        return self._product("jtu", self._input_vectors(u))

    @full_float32()
    def gram_product(self, u: Tensor) -> Tensor:
        """JJᵀu. Cost: 4 to 5 gradient evaluations a vector on the graph.

        Args:
            u: (victims, vectors, d).

        Returns:
            (victims, vectors, d).

        Raises:
            ValueError: shape, dtype or device that do not fit.
        """
        return self._product("gram_product", self._input_vectors(u))["x"].flatten(2)

    def _input_vectors(self, u: Tensor) -> dict[str, Tensor]:
        u = checks.input_vectors(u, unknowns=self.unknowns, like=self.inputs)
        return {"x": u.unflatten(-1, self.input_shape)}

    def _product(
        self, name: Literal["jv", "jtu", "gram_product"], vectors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        count = next(iter(vectors.values())).shape[1]
        with explained_failures():
            if not self._by_graph(vectors=count):
                product = getattr(functional_form, name)(self.objective)
                return functional_form.apply_product(
                    product, self.inputs, self.labels, vectors, chunk=self._pairs()
                )
            rows = []
            for victim in range(self.victims):
                graph = self._graph(victim)
                one = {n: v[victim] for n, v in vectors.items()}
                rows.append(getattr(graph, name)(one))
            return {n: stack([row[n] for row in rows]) for n in rows[0]}

    def _by_graph(self, *, vectors: int) -> bool:
        if self.form == "auto":
            return self.victims == 1 and vectors <= FEW_VECTORS
        return self.form == "graph"

    def _graph(self, victim: int) -> RetainedGraph:
        if victim not in self._kept:
            self._kept.clear()
            self._kept[victim] = retained_graph(
                self.objective, self.inputs[victim], self.labels[victim]
            )
        return self._kept[victim]

    def _pairs(self) -> int:
        return self.chunk or functional_form.default_chunk(self._pair_bytes, self.device)

    @cached_property
    def _pair_bytes(self) -> int:
        return functional_form.pair_bytes(self.objective, self.inputs[0], self.labels[0])


def influence_operator(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    reduction: Reduction = "mean",
    layers: Iterable[str] | None = None,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> InfluenceOperator:
    """The operator J = ∂(∇θ L)/∂x of a network at the private inputs.

    Cost: one forward pass of the first victim, to check model, labels and loss.

    Args:
        model: any network that can be differentiated twice; not changed.
        inputs: (victims, batch, *input shape), floating, any range: images or any other continuous
            input, such as embeddings.
        labels: (victims, batch) int64; probabilities (victims, batch, classes); or, with a loss of
            your own, anything with these two leading axes.
        loss: called as loss(outputs, labels, reduction=...) with one victim's batch.
        reduction: "mean" or "sum" of the loss over the batch.
        layers: names or prefixes of the shared layers; None shares all trainable parameters.
        form: "graph" retains the graph of forward and first backward pass, one victim at a time:
            large networks, single vectors. "functional" maps over vectors and victims: small
            networks, many vectors, GPU. "auto" goes by size, device and vectors of a call.
        dtype: torch.float64 computes in a copy of model and inputs in double precision; None keeps
            theirs.
        chunk: (victim, vector) pairs at once in the functional form; None goes by memory.

    Returns:
        InfluenceOperator.

    Raises:
        TypeError: inputs or labels of a wrong dtype.
        ValueError: anything else that does not fit, with the way out.

    Warns:
        RankWarning: fewer shared parameters than unknowns.

    ½(θx − y)² at x = 2, θ = 3, y = 1: g = (θx − y)x = 10 and J = 2θx − y = 11.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> def half_square(outputs, labels, *, reduction):
    ...     return 0.5 * (outputs - labels).square().mean()
    >>> operator = influence_operator(
    ...     model, torch.tensor([[[2.0]]]), torch.tensor([[[1.0]]]), loss=half_square
    ... )
    >>> operator.gradient()["weight"].item(), operator.jv({"weight": torch.ones(1, 1, 1)}).item()
    (10.0, 11.0)
    """
    checks.check_settings(form=form, reduction=reduction, dtype=dtype, chunk=chunk)
    checks.check_inputs(model, inputs, labels, dtype=dtype)
    frozen = checks.evaluable_copy(model, inputs)
    dtype = dtype or inputs.dtype
    # copies, so that a change of the caller's tensors does not reach half of the operator
    inputs = inputs.detach().to(dtype, copy=True)
    labels = labels.detach().to(dtype if labels.is_floating_point() else labels.dtype, copy=True)
    frozen = frozen.to(dtype)
    trainable = [n for n, p in frozen.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("expected a parameter with requires_grad=True, got none; unfreeze one")
    names = tuple(trainable) if layers is None else match_parameters(trainable, layers)
    objective = private_objective(frozen, loss=loss, reduction=reduction, names=names)
    checks.check_loss(frozen, inputs, labels, loss=loss, reduction=reduction)
    if form == "auto" and not inputs.is_cuda:
        size = sum(p.numel() for p in frozen.parameters())
        form = "graph" if size > VMAP_PARAMETERS else "auto"
    operator = InfluenceOperator(
        model=frozen, inputs=inputs, labels=labels, loss=loss, reduction=reduction,
        parameter_shapes={n: p.shape for n, p in objective.params.items()},
        form=form, chunk=chunk, objective=objective,
    )  # fmt: skip
    checks.warn_of_rank(operator.parameters, operator.unknowns)
    return operator
