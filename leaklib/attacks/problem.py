"""Gradient matching as many independent minimisations over dummy images and labels.

Row v·R + r of the problem is restart r of victim v. Its objective is

    D(∇θ L(x, y), ĝ) + α_tv TV(x) + α_bn R_bn(x)

and one evaluation costs one gradient and one product with its Jacobian (about 7/3 gradient
evaluations), for all rows of a chunk in one `vmap`. For a stochastic model the dummy gradient has
noise of its own, fresh at every evaluation and different in every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from leaklib.attacks.attacker_noise import SCORING, row_noise
from leaklib.attacks.distances import DISTANCES, tensor_weights
from leaklib.attacks.matching_settings import Matching
from leaklib.attacks.priors import statistics_distance, total_variation
from leaklib.gradients.client import Loss, update_function, victim_chunk
from leaklib.gradients.payload import SharedGradient, Statistics, check_payload, match_parameters
from leaklib.gradients.stateless import statistics_function
from leaklib.gradients.stochastic import Noise
from leaklib.precision import full_float32

Variables = dict[str, Tensor]
# images (k, batch, ...), rows (k,) -> a further term of the objective (k,) and its slope
Penalty = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Rows of independent minimisations over flat vectors.

    Args:
        shapes: variable -> shape of one row: "images" and, for an unknown label, "label_logits".
        evaluate: (x (k, size), rows (k,)[, number of the evaluation]) -> objective (k,), gradient
            (k, size). The number chooses the noise of a stochastic model: the same one, 0, unless
            it is given.
        pack: variables with a leading row axis -> (rows, size).
        unpack: the inverse, for any number of rows.
        stochastic: whether the objective depends on noise.
        score_noises: see `Matching`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    evaluate: Callable[..., tuple[Tensor, Tensor]]
    pack: Callable[[Variables], Tensor]
    unpack: Callable[[Tensor], Variables]
    stochastic: bool = False
    score_noises: int = 0

    def at(self, evaluations: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`evaluate` with fresh noise: that of the evaluation which comes next.

        Args:
            evaluations: spent so far (rows,), equal for all rows that are still searched for: an
                optimiser evaluates each of them once a tick.
        """
        if not self.stochastic:
            return self.evaluate
        return lambda x, rows: self.evaluate(x, rows, int(evaluations[rows[0]]))

    @full_float32()
    def score(self, x: Tensor, value: Tensor) -> Tensor:
        """Objective of every row, (rows,): the mean over noises that the search has not met.

        Args:
            x: (rows, size).
            value: the search's own, returned where there is nothing to average.
        """
        if not self.stochastic or not self.score_noises:
            return value
        rows = torch.arange(len(x), device=x.device)
        drawn = [self.evaluate(x, rows, SCORING + i)[0] for i in range(self.score_noises)]
        mean = torch.stack(drawn).double().mean(0)
        return torch.where(torch.isfinite(mean), mean, torch.inf)


def matching_problem(
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
    chunk: int | None = None,
    penalty: Penalty | None = None,
    noise_seed: int | None = None,
    noise: Noise | None = None,
) -> Problem:
    """Build the objective that a matching attack minimises.

    Args:
        model: the shared model.
        shared: what the clients released.
        image_shape: (channels, height, width), or the shape of another input.
        labels: (victims, batch) if known; None makes label logits a variable, whose softmax is
            the soft label (DLG).
        classes: number of classes.
        matching: distance, masks and priors.
        restarts: rows per victim.
        loss: the client's loss.
        label_shape: axes of one input's label beside its class.
        chunk: rows per vmap; None chooses by network size.
        penalty: a further term of the objective, for all rows at once.
        noise_seed: of the attacker's noise; needed for a stochastic model without `noise`.
        noise: the victims' own, where the attacker has found it out (`recover_noise`).

    Returns:
        The problem.

    Raises:
        ValueError: the payload does not fit the model, an unknown layer, total variation of what
            is no image, or a stochastic model without a seed.
    """
    check_payload(model, shared)
    if matching.tv_weight and len(image_shape) != 3:
        raise ValueError(
            f"expected images (channels, height, width) for total variation, got {image_shape}; "
            "pass a matching with tv_weight=0, such as Matching('cosine')"
        )
    names = match_parameters(
        shared.names, shared.names if matching.layers is None else matching.layers
    )
    weights = tensor_weights(names, matching.layer_weights or {})
    update = update_function(
        model, loss=loss, reduction=shared.reduction, protocol=shared.protocol, layers=names,
        extra_losses=matching.extra_losses,
    )  # fmt: skip
    draw = row_noise(
        model, shared.batch, seed=noise_seed, known=noise, victims=shared.victims,
        restarts=restarts, steps=shared.protocol.steps if shared.protocol else 1,
    )  # fmt: skip
    known = _known_statistics(model, shared) if matching.bn_weight else None
    measure = statistics_function(model)
    distance = DISTANCES[matching.distance]
    pixels = (shared.batch, *image_shape)
    shapes: dict[str, tuple[int, ...]] = {"images": pixels}
    if labels is None:
        shapes["label_logits"] = (shared.batch, classes, *label_shape)
    pack, unpack = packing(shapes)

    def one(
        variables: Variables,
        label: Tensor,
        target: dict[str, Tensor],
        stats: Statistics,
        noise: Noise,
    ) -> tuple[Tensor, Variables]:
        def shared_by(dummy: Variables) -> dict[str, Tensor]:
            soft = dummy["label_logits"].softmax(1) if "label_logits" in dummy else label
            return update(dummy["images"], soft, noise)

        grads, pull = vjp(shared_by, variables)  # type: ignore[misc]
        if matching.support:
            # outside the support the cotangent vanishes with the two tensors
            grads = {n: torch.where(target[n] != 0, g, 0.0) for n, g in grads.items()}
        value, cotangent = distance(grads, target, weights)
        (slope,) = pull(cotangent)
        if matching.tv_weight or matching.bn_weight:

            def prior(images: Tensor) -> Tensor:
                total = matching.tv_weight * total_variation(images)
                if matching.bn_weight:
                    measured = measure(images, noise)
                    total = total + matching.bn_weight * statistics_distance(measured, stats)
                return total

            extra, pull_prior = vjp(prior, variables["images"])  # type: ignore[misc]
            slope = slope | {"images": slope["images"] + pull_prior(torch.ones_like(extra))[0]}
            value = value + extra
        return value, slope

    batched = vmap(one)
    per_vmap = chunk or victim_chunk(model, shared.tensors[names[0]])
    blank = torch.zeros(shared.victims, shared.batch, dtype=torch.int64, device=shared.device)
    label_rows = labels if labels is not None else blank
    # Selecting the targets of the active rows copies them; most ticks ask for the same rows.
    cache: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}

    def targets(victims: Tensor) -> dict[str, Tensor]:
        if "last" not in cache or not torch.equal(cache["last"][0], victims):
            everyone = torch.equal(victims, torch.arange(shared.victims, device=victims.device))
            chosen = {
                n: shared.tensors[n] if everyone else shared.tensors[n][victims] for n in names
            }
            cache["last"] = (victims.clone(), chosen)
        return cache["last"][1]

    def evaluate(x: Tensor, rows: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        values, slopes = [], []
        for block in torch.arange(len(rows), device=rows.device).split(per_vmap):
            victims = rows[block] // restarts
            variables = unpack(x[block])
            stats = {n: (m[victims], v[victims]) for n, (m, v) in (known or {}).items()}
            drawn = draw(rows[block], number) if draw else {}
            if len(block) == 1:
                target = {n: shared.tensors[n][victims[0]] for n in names}
                single = {n: (m[0], v[0]) for n, (m, v) in stats.items()}
                first = {n: v[0] for n, v in variables.items()}
                own = {n: e[0] for n, e in drawn.items()}
                value, slope = one(first, label_rows[victims[0]], target, single, own)
                value, slope = value[None], {n: s[None] for n, s in slope.items()}
            else:
                value, slope = batched(
                    variables, label_rows[victims], targets(victims), stats, drawn
                )
            values.append(value.detach())
            slopes.append(pack({n: s.detach() for n, s in slope.items()}))
        total, gradient = torch.cat(values), torch.cat(slopes)
        if penalty is None:
            return total, gradient
        variables = unpack(x)
        extra, at_images = penalty(variables["images"], rows)
        rest = {n: torch.zeros_like(v) for n, v in variables.items()}
        return total + extra, gradient + pack(rest | {"images": at_images})

    return Problem(
        shapes, evaluate, pack, unpack, stochastic=draw is not None,
        score_noises=matching.score_noises,
    )  # fmt: skip


def packing(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Callable[[Variables], Tensor], Callable[[Tensor], Variables]]:
    """Variables as flat vectors and back, see `Problem`.

    >>> pack, unpack = packing({"images": (1, 2), "label_logits": (3,)})
    >>> unpack(torch.arange(5.0)[None])
    {'images': tensor([[[0., 1.]]]), 'label_logits': tensor([[2., 3., 4.]])}
    """
    sizes = [prod(shape) for shape in shapes.values()]

    def pack(variables: Variables) -> Tensor:
        return torch.cat([variables[name].flatten(1) for name in shapes], dim=1)

    def unpack(x: Tensor) -> Variables:
        parts = x.split(sizes, dim=1)
        return {n: p.reshape(-1, *shapes[n]) for n, p in zip(shapes, parts, strict=True)}

    return pack, unpack


def _known_statistics(model: nn.Module, shared: SharedGradient) -> Statistics:
    """The client's BatchNorm statistics if it shared them, else the model's running ones."""
    if shared.statistics is not None:
        return shared.statistics
    known = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            known[name] = (
                module.running_mean.expand(shared.victims, -1),
                module.running_var.expand(shared.victims, -1),
            )
    if not known:
        raise ValueError(
            "expected a model with BatchNorm layers for bn_weight > 0, got none; set bn_weight=0"
        )
    return known
