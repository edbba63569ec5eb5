"""Gradient matching on dense networks without forming a gradient.

In a chain of linear layers and elementwise maps no sample sees another, so one forward pass serves
all rows of a problem at once. With a layer's inputs a_b and output gradients δ_b, everything that a
distance needs is

    ‖G‖² = Σ_bc (δ_b·δ_c)(a_b·a_c),  ⟨G, Ĝ⟩ = Σ_b δ_bᵀ Ĝ a_b,  and without the a's for a bias,

and the image gradient is one differentiation through a and δ. The generic problem materialises
every parameter gradient of every row several times a step instead. Both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from leaklib.attacks.attacker_noise import attacker_noise
from leaklib.attacks.distances import positive, tensor_weights
from leaklib.attacks.ghost_targets import (
    Rows,
    Target,
    choose_rows,
    factor_target,
    inner_product,
    squared_distance,
    squared_norm,
)
from leaklib.attacks.priors import total_variation
from leaklib.attacks.problem import Matching, Penalty, Problem, Variables, packing
from leaklib.defenses.bottleneck import VariationalBottleneck
from leaklib.gradients.client import Loss
from leaklib.gradients.payload import SharedGradient, check_payload, match_parameters
from leaklib.gradients.stateless import without_side_effects
from leaklib.gradients.stochastic import (
    Noise,
    add_losses,
    collected_losses,
    noise_shapes,
)
from leaklib.influence.ghost_plan import hooked
from leaklib.margin_losses import MarginLoss
from leaklib.models import Normalise
from leaklib.models.initialisation import ACTIVATIONS

# Exact types: a subclass may mix samples.
_ELEMENTWISE = (Normalise, *{type(make()) for make in ACTIVATIONS.values()})
_LINKS = (nn.Sequential, nn.Linear, VariationalBottleneck, *_ELEMENTWISE)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True, eq=False)
class _Released:
    """What was shared of one linear layer: weight, bias or both, by their names."""

    weight: str | None
    bias: str | None


def ghost_problem(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    labels: Tensor | None,
    classes: int,
    matching: Matching,
    restarts: int,
    loss: Loss,
    label_shape: tuple[int, ...] = (),
    penalty: Penalty | None = None,
    noise_seed: int | None = None,
) -> Problem | None:
    """Build the objective of `matching_problem` from activations, where that is possible.

    It is for a chain of linear layers, elementwise activations, flattening, normalisation and
    PRECODE's bottleneck; a single gradient, not a FedAvg update; cross-entropy or a loss of one
    logit; no prior on BatchNorm statistics, and no comparison on the support of the release alone.

    Cost: two forward and two backward passes of all rows together, without weight gradients. Where
    a defense perturbed a layer, also two passes over its released gradient.

    Args:
        model: the shared model.
        shared: what the clients released.
        image_shape: (channels, height, width), or the shape of another input.
        labels: (victims, batch) if known; None makes label logits a variable.
        classes: number of classes.
        matching: distance, masks and priors.
        restarts: rows per victim.
        loss: the client's loss.
        label_shape: axes of one input's label beside its class.
        penalty: a further term of the objective, for all rows at once.
        noise_seed: of the attacker's noise; needed for a stochastic model.

    Returns:
        The problem, with the values and gradients of `matching_problem`; None where that one is
        needed.

    Raises:
        ValueError: as `matching_problem`.
    """
    steps = shared.protocol.steps if shared.protocol else 1
    known_loss = loss is F.cross_entropy or isinstance(loss, MarginLoss)
    if steps > 1 or not known_loss or matching.bn_weight or matching.support or label_shape:
        return None
    if not _is_chain(model) or not _accepts(model, image_shape):
        return None
    check_payload(model, shared)
    if matching.tv_weight and len(image_shape) != 3:
        return None  # refused there with the reason
    names = match_parameters(
        shared.names, shared.names if matching.layers is None else matching.layers
    )
    weights = tensor_weights(names, matching.layer_weights or {})
    layers = _released_layers(names)
    draw = attacker_noise(model, shared.batch, seed=noise_seed)
    targets = {
        part.weight: factor_target(shared.tensors[part.weight], shared.batch)
        for part in layers.values()
        if part.weight is not None
    }
    frozen = without_side_effects(model, noise=True).requires_grad_(False)
    modules = {name: frozen.get_submodule(name) for name in layers}
    shapes: dict[str, tuple[int, ...]] = {"images": (shared.batch, *image_shape)}
    if labels is None:
        shapes["label_logits"] = (shared.batch, classes)
    pack, unpack = packing(shapes)

    def activations(
        variables: Variables, victims: Tensor, drawn: Noise
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and output gradients of the layers, (rows, batch, features)."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def note(name: str, _module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
            inputs[name], outputs[name] = value, output
            return output

        # the first and only local step, rows and batch as one axis
        buffers = {n: epsilon[:, 0].flatten(0, 1) for n, epsilon in drawn.items()}
        with hooked(modules, note), collected_losses() as terms:
            logits = functional_call(frozen, buffers, (variables["images"].flatten(0, 1),))
        if labels is None:
            label = variables["label_logits"].softmax(2).flatten(0, 1)
        else:
            label = labels[victims].flatten(0, 1)
        # the sum over rows: no row's loss depends on another row
        total = loss(logits, label, reduction="sum")
        if matching.extra_losses:
            total = add_losses(total, terms, "sum")
        if shared.reduction == "mean":
            total = total / shared.batch
        deltas = torch.autograd.grad(total, list(outputs.values()), create_graph=True)
        each = (len(victims), shared.batch)
        return (
            {name: value.unflatten(0, each) for name, value in inputs.items()},
            {n: d.unflatten(0, each) for n, d in zip(outputs, deltas, strict=True)},
        )

    def objective(variables: Variables, rows: Rows, drawn: Noise) -> Tensor:
        inputs, deltas = activations(variables, rows.victims, drawn)
        terms: dict[str, Tensor] = {}
        for name, part in layers.items():
            a, delta = inputs[name], deltas[name]
            if part.weight is not None:
                terms[part.weight] = _weight_terms(
                    matching.distance, targets[part.weight], rows, a, delta
                )
            if part.bias is not None:
                bias = shared.tensors[part.bias][rows.victims]
                terms[part.bias] = _bias_terms(matching.distance, bias, delta.sum(1))
        value = _combined(matching.distance, terms, weights)
        if matching.tv_weight:
            value = value + matching.tv_weight * vmap(total_variation)(variables["images"])
        return value

    @torch.enable_grad()
    def evaluate(x: Tensor, rows: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        variables = {n: v.detach().requires_grad_() for n, v in unpack(x).items()}
        drawn = draw(rows, number) if draw else {}
        value = objective(variables, choose_rows(rows // restarts, shared.victims), drawn)
        slopes = torch.autograd.grad(value.sum(), list(variables.values()))
        value, gradient = value.detach(), pack(dict(zip(variables, slopes, strict=True)))
        if penalty is None:
            return value, gradient
        images = variables["images"].detach()
        extra, at_images = penalty(images, rows)
        rest = {n: torch.zeros_like(v) for n, v in variables.items()}
        return value + extra, gradient + pack(rest | {"images": at_images})

    return Problem(
        shapes, evaluate, pack, unpack, stochastic=draw is not None,
        score_noises=matching.score_noises,
    )  # fmt: skip


def _is_chain(model: nn.Module) -> bool:
    """No sample sees another, and every parameter is a linear layer's, used once."""
    parameters = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if len(set(parameters)) != len(parameters):
        return False
    return all(_is_link(module) for module in model.modules())


def _is_link(module: nn.Module) -> bool:
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    if type(module) is nn.Flatten:
        return module.start_dim == 1 and module.end_dim == -1
    if type(module) in _DROPOUT:
        return not module.training  # in train mode the generic problem says what to do
    return type(module) in _LINKS


def _accepts(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Whether every linear layer meets one vector a sample, and the model takes such an input."""
    vectors: list[bool] = []

    def note(_name: str, _module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
        vectors.append(value.ndim == 2)
        return output

    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    first = next(model.parameters())
    still = {n: first.new_zeros(shape[1:]) for n, shape in noise_shapes(model, 1).items()}
    try:
        with torch.no_grad(), hooked(linear, note):
            functional_call(model, still, (first.new_zeros(1, *image_shape),))
    except RuntimeError:
        return False  # the generic problem reports it
    return len(vectors) == len(linear) and all(vectors)


def _released_layers(names: tuple[str, ...]) -> dict[str, _Released]:
    """Linear layers by module path, with what is compared of them."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        found.setdefault(layer, {})[kind] = name
    return {n: _Released(kinds.get("weight"), kinds.get("bias")) for n, kinds in found.items()}


def _weight_terms(
    distance: str, target: Target, rows: Rows, a: Tensor, delta: Tensor
) -> Tensor:
    """(rows,) squared distance, or (3, rows) inner product and both squared norms."""
    if distance == "l2":
        return squared_distance(target, rows, a, delta)
    inner = inner_product(target, rows, a, delta)
    return torch.stack([inner, squared_norm(a, delta), target.square[rows.victims]])


def _bias_terms(distance: str, target: Tensor, bias: Tensor) -> Tensor:
    """The same of a bias gradient (rows, out), which is small enough to be formed."""
    if distance == "l2":
        return (bias - target).square().sum(1)
    products = [(bias * target), bias.square(), target.square()]
    return torch.stack([product.sum(1) for product in products])


def _combined(
    distance: str, terms: Mapping[str, Tensor], weights: Mapping[str, float]
) -> Tensor:
    """The distance of every row; see `leaklib.attacks.distances` for the formulas."""
    if distance == "cosine":
        return _one_minus_cosine(sum(weights[n] * term for n, term in terms.items()))
    if distance == "layer_cosine":
        terms = {n: _one_minus_cosine(term) for n, term in terms.items()}
    total = sum(weights[n] * term for n, term in terms.items())
    assert isinstance(total, Tensor)
    return total


def _one_minus_cosine(products: Tensor | int) -> Tensor:
    assert isinstance(products, Tensor)
    inner, norm, fixed = products
    return 1 - inner / (positive(norm).sqrt() * positive(fixed).sqrt())
