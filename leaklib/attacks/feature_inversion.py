"""The attack on the encoder that partial perturbation leaves alone: its gradient holds h exactly.

The encoder of a fully connected bottleneck is a linear layer with a bias, and what enters it does
not depend on the bottleneck's noise. One picture's gradient there is k [h | 1], so one division
gives the features h, whatever was done to the layers before. What is left is a picture with these
features: an ordinary inversion of a deterministic network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp, vmap

from leaklib.attacks import adam, lbfgs
from leaklib.attacks.analytic import invert_linear
from leaklib.attacks.driver import RunSettings, drive, snapshot_counts
from leaklib.attacks.features_before import features_before
from leaklib.attacks.labels import check_last_layer, recover_label
from leaklib.attacks.matching import conclude
from leaklib.attacks.matching_settings import Matching
from leaklib.attacks.priors import total_variation
from leaklib.attacks.problem import Penalty, Problem, matching_problem, packing
from leaklib.attacks.reconstruction import Reconstruction
from leaklib.attacks.starting import starting_variables
from leaklib.checkpoint import digest
from leaklib.defenses.layer_order import BottleneckParts, bottleneck_parts
from leaklib.gradients.client import Loss
from leaklib.gradients.payload import SharedGradient, check_payload


def encoder_features(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    bottleneck: str | None = None,
) -> Tensor:
    """What enters the bottleneck, from the gradient of its encoder: h = (∂L/∂W_e)ᵀ k / (kᵀk).

    k = ∂L/∂b_e depends on the bottleneck's noise, h does not. Exact up to rounding. Source: ours;
    the division is that of `invert_linear`.

    Args:
        model: the shared model, with a fully connected bottleneck.
        shared: the released gradients, batch 1, with the encoder's as the client computed them.
        image_shape: (channels, height, width), or the shape of another input.
        bottleneck: its name, where the model has several.

    Returns:
        Features (victims, features), float64, flattened.

    Raises:
        ValueError: batch > 1, several local steps, no such bottleneck, a convolutional one, an
            encoder that was not shared, or one whose bias gradient is zero.
    """
    check_payload(model, shared)
    parts = bottleneck_parts(model, image_shape, bottleneck=bottleneck)
    weight, bias = _encoder(model, shared, parts)
    found = invert_linear(shared.tensors[weight], shared.tensors[bias])
    if not torch.isfinite(found).all():
        victim = int((~torch.isfinite(found).all(1)).nonzero()[0])
        raise ValueError(
            f"expected a gradient of {bias!r} that is not zero, got zero for victim {victim}; it "
            "was pruned or nothing flows back: use ignore_stochastic"
        )
    return found


def feature_inversion(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    generator: torch.Generator,
    bottleneck: str | None = None,
    labels: Tensor | None = None,
    tv_weight: float = 0.1,
    matching: Matching | None = None,
    feature_weight: float = 1.0,
    optimiser: adam.AdamSettings | None = None,
    max_evaluations: int = 500,
    restarts: int = 1,
    start: str | Mapping[str, Tensor] = "normal",
    loss: Loss = F.cross_entropy,
    run: RunSettings | None = None,
) -> Reconstruction:
    """A picture with the private features: min w ‖f(x) − h‖²/‖h‖² + α TV(x) [+ D(∇L(x, y), ĝ)].

    f runs the layers before the bottleneck, and h is read off the encoder (`encoder_features`).
    Behind a ReLU, ‖·‖² runs over its inputs: h where h > 0, and no more than 0 elsewhere.
    With `matching`, the distance D to the released, perhaps perturbed, gradients of these layers
    joins; the attacker's noise is fresh at every evaluation then.

    Cost: an evaluation is one forward and one backward pass of the layers before the bottleneck;
    with `matching` that of `invert_gradients` besides.
    Source: ours; an adaptive attack on PRECODE with partial perturbation (arXiv 2208.04767), as we
    read it.

    Args:
        model: the shared model, in the client's mode.
        shared: the released gradients, batch 1.
        image_shape: (channels, height, width) of one private image, or the shape of another input.
        generator: draws the starts and the attacker's noise.
        bottleneck: its name, where the model has several.
        labels: (victims, 1) if known; None recovers them from the last layer.
        tv_weight: α, weight of the total variation without `matching`, which brings its own.
        matching: distance and priors of the further term; its layers are replaced by those before
            the bottleneck. None leaves the term out.
        feature_weight: w, > 0.
        optimiser: Adam's settings; None is L-BFGS, which has no box and needs an objective without
            fresh noise.
        max_evaluations: budget of each victim and restart.
        restarts: independent starts per victim; the lowest objective is returned.
        start: "normal", "uniform", "grey", or {"images": ...} with a leading
            (victims * restarts) axis. With little total variation "grey" goes much further.
        loss: the client's loss.
        run: progress, snapshots and checkpoint.

    Returns:
        Reconstruction.

    Raises:
        ValueError: as `encoder_features`; features that are all zero; settings that do not fit.
    """
    if restarts < 1 or not feature_weight > 0 or tv_weight < 0:
        raise ValueError(
            "expected restarts >= 1, feature_weight > 0 and tv_weight >= 0, got "
            f"restarts={restarts}, feature_weight={feature_weight}, tv_weight={tv_weight}"
        )
    if tv_weight and matching is None and len(image_shape) != 3:
        raise ValueError(
            f"expected images (channels, height, width) for total variation, got {image_shape}; "
            "pass tv_weight=0"
        )
    if matching is not None and optimiser is None:
        raise ValueError(
            "expected Adam's settings with matching, whose noise is fresh at every evaluation; "
            "pass optimiser=AdamSettings()"
        )
    run = run or RunSettings()
    run = replace(run, snapshots=snapshot_counts(run.snapshots))
    parts = bottleneck_parts(model, image_shape, bottleneck=bottleneck)
    features = encoder_features(model, shared, image_shape=image_shape, bottleneck=bottleneck)
    if labels is None:
        check_last_layer(model, shared)
        labels = recover_label(shared)
    name = parts.encoder[0].rpartition(".encoder.")[0]
    f, rectified = features_before(model, name, image_shape)
    penalty = _feature_distance(f, rectified, features, restarts, feature_weight)
    if matching is None:
        problem = _picture_problem(penalty, (1, *image_shape), tv_weight)
    else:
        kept = tuple(n for n in shared.names if n in parts.before)
        if not kept:
            raise ValueError(
                f"expected some of {', '.join(parts.before)} among the shared layers for matching, "
                f"got {', '.join(shared.names)}; leave matching out"
            )
        problem = matching_problem(
            model, shared, image_shape=image_shape, labels=labels, classes=0, restarts=restarts,
            matching=replace(matching, layers=kept), loss=loss, penalty=penalty,
            noise_seed=int(torch.randint(2**62, (), generator=generator, device=generator.device)),
        )  # fmt: skip
    x = problem.pack(starting_variables(problem.shapes, shared, restarts, start, generator))
    identity = {
        "attack": "feature_inversion", "matching": str(matching), "tv_weight": tv_weight,
        "feature_weight": feature_weight, "optimiser": str(optimiser and asdict(optimiser)),
        "restarts": restarts, "features": digest({"features": features}),
        "model": digest(model.state_dict()), "start": digest({"start": x}),
        "payload": digest(shared.tensors),
    }  # fmt: skip

    def tick(state: Any) -> None:
        if optimiser is None:
            lbfgs.tick(state, problem.evaluate)
        else:
            adam.tick(state, problem.at(state.evaluations), optimiser)

    state, trace = drive(
        lbfgs.start(x) if optimiser is None else adam.start(x, optimiser),
        tick, max_evaluations=max_evaluations, settings=run, identity=identity,
        label="feature inversion",
    )  # fmt: skip
    return conclude(problem, state, trace, labels, restarts)


def _feature_distance(
    f: Callable[[Tensor], Tensor], rectified: bool, features: Tensor, restarts: int, weight: float
) -> Penalty:
    """The term w ‖f(x) − h‖² / ‖h‖² and its slope, for the rows of a problem."""
    energy = features.square().sum(1)
    if bool((energy == 0).any()):
        raise ValueError(
            f"expected features that are not zero, got zero for victim {int(energy.argmin())}: no "
            "neuron before the bottleneck was active"
        )

    def one(images: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        def distance(x: Tensor) -> Tensor:
            z = f(x)[0]
            wrong = z - target
            if rectified:
                wrong = torch.where((target > 0) | (z > 0), wrong, 0.0)
            return scale * wrong.square().sum()

        value, pull = vjp(distance, images)  # type: ignore[misc]
        return value, pull(torch.ones_like(value))[0]

    def distances(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        victims = rows // restarts
        target, scale = features[victims].to(images), (weight / energy)[victims].to(images)
        value, slope = vmap(one)(images, target, scale)
        return value.detach(), slope.detach()

    return distances


def _picture_problem(penalty: Penalty, shape: tuple[int, ...], tv_weight: float) -> Problem:
    """The penalty and α TV alone, without gradients of parameters."""
    pack, unpack = packing({"images": shape})

    def evaluate(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = unpack(x)["images"]
        value, slope = penalty(images, rows)
        if tv_weight:
            prior, pull = vjp(vmap(total_variation), images)  # type: ignore[misc]
            value = value + tv_weight * prior
            slope = slope + tv_weight * pull(torch.ones_like(prior))[0]
        return value.detach(), pack({"images": slope.detach()})

    return Problem({"images": shape}, evaluate, pack, unpack)


def _encoder(
    model: nn.Module, shared: SharedGradient, parts: BottleneckParts
) -> tuple[str, str]:
    """Names of the encoder's weight and bias, where one division gives its input."""
    parameters = dict(model.named_parameters())
    kinds = {n.rpartition(".")[2]: n for n in parts.encoder if parameters[n].ndim <= 2}
    if set(kinds) != {"weight", "bias"} or len(parts.encoder) != 2:
        raise ValueError(
            "expected a bottleneck whose encoder is fully connected with a bias, got "
            f"{ {n: tuple(parameters[n].shape) for n in parts.encoder} }; use ignore_stochastic"
        )
    if missing := [n for n in kinds.values() if n not in shared.tensors]:
        raise ValueError(
            f"expected the encoder's gradient, missing {', '.join(missing)}; without it use "
            "ignore_stochastic"
        )
    if shared.batch != 1 or (shared.protocol is not None and shared.protocol.steps > 1):
        raise ValueError(
            f"expected batch 1 and one local step, got batch {shared.batch} and "
            f"{shared.protocol.steps if shared.protocol else 1} steps: others leak only a mixture "
            "of features; use ignore_stochastic"
        )
    return kinds["weight"], kinds["bias"]
