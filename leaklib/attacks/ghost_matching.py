"""Gradient matching without forming the large gradients.

Where no sample sees another, one forward pass serves all rows of a problem at once. With a layer's
inputs a_t and output gradients δ_t, t over the samples and positions of a row, everything that a
distance needs of a weight is

    ‖G‖² = Σ_tu (δ_t·δ_u)(a_t·a_u),  ⟨G, Ĝ⟩ = Σ_t δ_tᵀ Ĝ a_t,  and without the a's for a bias,

and the image gradient is one differentiation through a and δ. Where positions are many and weights
few, G = Σ_t δ_t a_tᵀ itself is cheaper. The generic problem materialises every parameter gradient
of every row several times a step instead. Both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from leaklib.attacks.attacker_noise import row_noise
from leaklib.attacks.distances import positive, tensor_weights
from leaklib.attacks.ghost_layers import columns, find_layers, small_gradients
from leaklib.attacks.ghost_targets import (
    Rows,
    Target,
    choose,
    choose_rows,
    factor_target,
    inner_product,
    squared_distance,
    squared_norm,
)
from leaklib.attacks.matching_settings import Matching
from leaklib.attacks.priors import total_variation
from leaklib.attacks.problem import Problem, packing
from leaklib.gradients.client import Loss
from leaklib.gradients.payload import SharedGradient, check_payload, match_parameters
from leaklib.gradients.stateless import without_side_effects
from leaklib.gradients.stochastic import Noise, add_losses, collected_losses
from leaklib.influence.ghost_plan import hooked
from leaklib.margin_losses import MarginLoss

# entries of activations and formed gradients that one pass may hold; ResNet-18 and the vision
# transformer in float32 then need 0.4 to 0.7 GB on top of the model
_ENTRIES = 2**26


def ghost_problem(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    labels: Tensor,
    matching: Matching,
    restarts: int,
    loss: Loss,
    noise_seed: int | None = None,
    noise: Noise | None = None,
) -> Problem | None:
    """Build the objective of `matching_problem` from activations, where that is possible.

    It is for networks whose compared parameters belong to linear layers, convolutions,
    normalisation layers and positions of tokens, and whose samples do not see each other (see
    `find_layers`); a single gradient, not a FedAvg update; one known label an input; cross-entropy
    or a loss of one logit; no prior on BatchNorm statistics, and no comparison on the support of
    the release alone.

    Cost: two forward and two backward passes of all rows together, and the weight gradients of the
    layers whose positions are many. Where a defense perturbed another layer, also two passes over
    its released gradient.

    Args:
        model: the shared model.
        shared: what the clients released.
        image_shape: (channels, height, width), or the shape of another input.
        labels: (victims, batch), known.
        matching: distance, masks and priors.
        restarts: rows per victim.
        loss: the client's loss.
        noise_seed: of the attacker's noise; needed for a stochastic model without `noise`.
        noise: the victims' own, where the attacker has found it out (`recover_noise`).

    Returns:
        The problem, with the values and gradients of `matching_problem`; None where that one is
        needed.

    Raises:
        ValueError: as `matching_problem`.
    """
    steps = shared.protocol.steps if shared.protocol else 1
    known_loss = loss is F.cross_entropy or isinstance(loss, MarginLoss)
    made_there = any(tensor.is_inference() for tensor in shared.tensors.values())
    if torch.is_inference_mode_enabled() or made_there:
        return None  # autograd works neither there nor with what was made there
    if steps > 1 or not known_loss or matching.bn_weight or matching.support:
        return None
    if labels.ndim != 2:
        return None  # the mean is over positions too
    check_payload(model, shared)
    if matching.tv_weight and len(image_shape) != 3:
        return None  # refused there with the reason
    names = match_parameters(
        shared.names, shared.names if matching.layers is None else matching.layers
    )
    weights = tensor_weights(names, matching.layer_weights or {})
    draw = row_noise(
        model, shared.batch, seed=noise_seed, known=noise, victims=shared.victims,
        restarts=restarts, steps=1,
    )  # fmt: skip
    frozen = without_side_effects(model, noise=True).requires_grad_(False)
    found = find_layers(frozen, names, image_shape=image_shape, batch=shared.batch)
    if found is None:
        return None
    layers, carried = found
    modules = {name: frozen.get_submodule(name) for name in layers}
    targets = {
        layer.released["weight"]: factor_target(
            shared.tensors[layer.released["weight"]].flatten(2), shared.batch * layer.positions
        )
        for layer in layers.values()
        if layer.factored and "weight" in layer.released
    }
    per_row = shared.batch * (carried + sum(layer.entries for layer in layers.values()))
    chunk = max(1, _ENTRIES // per_row)
    shapes = {"images": (shared.batch, *image_shape)}
    pack, unpack = packing(shapes)

    def activations(
        images: Tensor, victims: Tensor, drawn: Noise
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and output gradients of the layers, (rows · batch, ...)."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def note(name: str, _module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
            # torch itself tracks no output that is cut off from the images
            inputs[name], outputs[name] = value, output.requires_grad_()
            return output.clone()  # which what follows may overwrite

        # the first and only local step, rows and batch as one axis
        buffers = {n: epsilon[:, 0].flatten(0, 1) for n, epsilon in drawn.items()}
        with hooked(modules, note), collected_losses() as terms:
            logits = functional_call(frozen, buffers, (images.flatten(0, 1),))
        # the sum over rows: no row's loss depends on another row
        total = loss(logits, labels[victims].flatten(0, 1), reduction="sum")
        if matching.extra_losses:
            total = add_losses(total, terms, "sum")
        if shared.reduction == "mean":
            total = total / shared.batch
        deltas = torch.autograd.grad(total, list(outputs.values()), create_graph=True)
        return inputs, dict(zip(outputs, deltas, strict=True))

    def objective(images: Tensor, rows: Rows, drawn: Noise) -> Tensor:
        inputs, deltas = activations(images, rows.victims, drawn)
        terms: dict[str, Tensor] = {}
        for name, layer in layers.items():
            module, a, delta = modules[name], inputs[name], deltas[name]
            small = small_gradients(module, a, delta, shared.batch)
            for own, full in layer.released.items():
                if own in small:
                    terms[full] = _formed_terms(
                        matching.distance, choose(shared.tensors[full], rows), small[own]
                    )
                    continue
                pair = columns(module, a, delta)
                a_t, d_t = (v.unflatten(0, (-1, shared.batch)).flatten(1, 2) for v in pair)
                if layer.factored:
                    terms[full] = _factored_terms(matching.distance, targets[full], rows, a_t, d_t)
                else:
                    terms[full] = _formed_terms(
                        matching.distance, choose(shared.tensors[full], rows), d_t.mT @ a_t
                    )
        value = _combined(matching.distance, terms, weights)
        if matching.tv_weight:
            value = value + matching.tv_weight * vmap(total_variation)(images)
        return value

    @torch.enable_grad()
    def evaluate_block(x: Tensor, rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        images = unpack(x)["images"].detach().requires_grad_()
        drawn = draw(rows, number) if draw else {}
        value = objective(images, choose_rows(rows // restarts, shared.victims), drawn)
        (slope,) = torch.autograd.grad(value.sum(), images)
        return value.detach(), pack({"images": slope})

    def evaluate(x: Tensor, rows: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        blocks = zip(x.split(chunk), rows.split(chunk), strict=True)
        parts = [evaluate_block(part, some, number) for part, some in blocks]
        value, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
        return value, gradient

    return Problem(
        shapes, evaluate, pack, unpack, stochastic=draw is not None,
        score_noises=matching.score_noises,
    )  # fmt: skip


def _factored_terms(
    distance: str, target: Target, rows: Rows, a: Tensor, delta: Tensor
) -> Tensor:
    """(rows,) squared distance, or (3, rows) inner product and both squared norms."""
    if distance == "l2":
        return squared_distance(target, rows, a, delta)
    inner = inner_product(target, rows, a, delta)
    return torch.stack([inner, squared_norm(a, delta), target.square[rows.victims]])


def _formed_terms(distance: str, target: Tensor, gradient: Tensor) -> Tensor:
    """The same of gradients (rows, ...) that were formed."""
    target, gradient = target.flatten(1), gradient.flatten(1)
    if distance == "l2":
        return (gradient - target).square().sum(1)
    products = [(gradient * target), gradient.square(), target.square()]
    return torch.stack([product.sum(1) for product in products])


def _combined(
    distance: str, terms: Mapping[str, Tensor], weights: Mapping[str, float]
) -> Tensor:
    """The distance of every row; see `leaklib.attacks.distances` for the formulas."""
    if distance == "layer_cosine":
        terms = {n: _one_minus_cosine(term) for n, term in terms.items()}
    total = torch.stack([weights[n] * term for n, term in terms.items()]).sum(0)
    return _one_minus_cosine(total) if distance == "cosine" else total


def _one_minus_cosine(products: Tensor) -> Tensor:
    inner, norm, fixed = products
    return 1 - inner / (positive(norm).sqrt() * positive(fixed).sqrt())
