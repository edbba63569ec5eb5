"""The victim's noise, read off encoder and decoder: against the noise that was drawn."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_victims, small_lenet, small_mlp

from leaklib.attacks import (
    CVB_STEPS,
    DIA_STEPS,
    PRECODE_STEPS,
    AdamSettings,
    Matching,
    ignore_stochastic,
    invert_gradients,
    match_known_noise,
    recover_noise,
)
from leaklib.attacks.problem import matching_problem
from leaklib.defenses import (
    GaussianNoise,
    attack_layers,
    insert_bottleneck,
    partial_perturbation,
)
from leaklib.gradients import FedAvg, draw_noise, share_gradient, update_function
from leaklib.metrics import mse

SHAPE = (1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("host", [small_mlp, small_lenet])
@pytest.mark.parametrize("width", [3, 40])
def test_it_is_the_noise_that_was_drawn(host, width):
    """Also behind partial perturbation, which leaves encoder and decoder alone."""
    model = insert_bottleneck(host(), image_shape=SHAPE, width=width)
    victims = random_victims()
    shared = share_gradient(model, victims, generator=seeded(5))
    drawn = draw_noise(model, 1, generator=seeded(5), clients=len(victims))
    defense = partial_perturbation(model, GaussianNoise(10.0), image_shape=SHAPE)
    for released in (shared, defense(shared, generator=seeded(1))):
        found = recover_noise(model, released, image_shape=SHAPE)
        assert found.keys() == drawn.keys()
        for name, noise in drawn.items():
            torch.testing.assert_close(found[name], noise, rtol=1e-7, atol=1e-7)


def test_with_it_every_gradient_is_a_function_of_the_picture():
    model, victims = insert_bottleneck(small_mlp(), image_shape=SHAPE), random_victims()
    shared = share_gradient(model, victims, generator=seeded(5))
    noise = recover_noise(model, shared, image_shape=SHAPE)
    update = update_function(model)
    for v in range(len(victims)):
        own = {name: tensor[v] for name, tensor in noise.items()}
        grads = update(victims.images[v], victims.labels[v], own)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, shared.tensors[name][v], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("host", [small_mlp, small_lenet])
def test_the_attack_on_all_gradients_works_again(host):
    """The attack that the bottleneck is there to stop; each path, ghost and generic."""
    model, victims = insert_bottleneck(host(), image_shape=SHAPE, width=40), random_victims()
    shared = share_gradient(model, victims, generator=seeded(5))
    known = recover_noise(model, shared, image_shape=SHAPE)
    errors = []
    for noise in (None, known):
        found = invert_gradients(
            model, shared, image_shape=SHAPE, generator=seeded(), labels=victims.labels,
            matching=Matching("cosine"), optimiser=AdamSettings(lr=0.05, steps=400), noise=noise,
        )  # fmt: skip
        errors.append(mse(found.images[:, 0], victims.images[:, 0]).median())
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("host", [small_mlp, small_lenet])
def test_both_groups_weigh_alike(host):
    """Against weights written out; behind partial perturbation it beats the ignoring attack."""
    model, victims = insert_bottleneck(host(), image_shape=SHAPE, width=40), random_victims()
    shared = share_gradient(model, victims, generator=seeded(5))
    defense = partial_perturbation(model, GaussianNoise(0.01), image_shape=SHAPE)
    released = defense(shared, generator=seeded(1))
    known = {"image_shape": SHAPE, "labels": victims.labels,
             "optimiser": AdamSettings(lr=0.05, steps=300)}  # fmt: skip
    plain = Matching("cosine")
    found = match_known_noise(model, released, generator=seeded(), matching=plain, **known)
    exact = [n for n in released.names if n.startswith("fc.")]
    length = lambda names: sum(released.tensors[n].norm() ** 2 for n in names)  # noqa: E731
    ratio = float(length(set(released.names) - set(exact)) / length(exact))
    noise = recover_noise(model, released, image_shape=SHAPE)
    same = invert_gradients(
        model, released, generator=seeded(), noise=noise,
        matching=Matching("cosine", layer_weights=dict.fromkeys(exact, ratio)), **known,
    )  # fmt: skip
    torch.testing.assert_close(found.objective, same.objective, rtol=1e-4, atol=1e-6)
    ignoring = ignore_stochastic(model, released, generator=seeded(), matching=plain, **known)
    errors = [mse(r.images[:, 0], victims.images[:, 0]).mean() for r in (found, ignoring)]
    assert errors[0] < 0.8 * errors[1], errors


def test_the_weights_are_its_own():
    model, victims = insert_bottleneck(small_mlp(), image_shape=SHAPE), random_victims()
    shared = share_gradient(model, victims, generator=seeded())
    for matching in (Matching(layers=("fc",)), Matching(layer_weights={"fc": 2.0})):
        with pytest.raises(ValueError, match=r"without layers and layer_weights.*recover_noise"):
            match_known_noise(
                model, shared, image_shape=SHAPE, generator=seeded(), matching=matching
            )


def test_what_it_refuses():
    model, victims = insert_bottleneck(small_mlp(), image_shape=SHAPE), random_victims()
    shared = share_gradient(model, victims, generator=seeded())
    pruned = shared.replace(
        {n: 0 * t if n == "fc.bottleneck.decoder.bias" else t for n, t in shared.items()}
    )
    with pytest.raises(ValueError, match="decoder.bias' that is not zero, got zero for victim 0"):
        recover_noise(model, pruned, image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"decoder\.weight.*ignore_stochastic"):
        recover_noise(
            model, shared.select(["hidden1", "fc.bottleneck.encoder"]), image_shape=SHAPE
        )
    with pytest.raises(ValueError, match=r"noise of shapes.*recover_noise"):
        invert_gradients(
            model, shared, image_shape=SHAPE, generator=seeded(), labels=victims.labels,
            noise={"fc.bottleneck.noise": torch.zeros(1, 1, 1, 2)},
        )  # fmt: skip


def test_a_width_that_underflows_is_told():
    model, victims = insert_bottleneck(small_mlp(), image_shape=SHAPE, width=3), random_victims()
    with torch.no_grad():
        model.fc.bottleneck.encoder.bias[-1] = -1e4
    shared = share_gradient(model, victims, generator=seeded())
    with pytest.raises(ValueError, match="widths σ above 0.*victim 0"):
        recover_noise(model, shared, image_shape=SHAPE)


def test_a_group_of_no_length():
    """Exact gradients that are zero, if only when squared, are refused; perturbed ones are not."""
    model, victims = insert_bottleneck(small_mlp(), image_shape=SHAPE), random_victims()
    shared = share_gradient(model, victims, generator=seeded(5))
    known = {"image_shape": SHAPE, "labels": victims.labels, "max_evaluations": 3}
    for scale in (0.0, 1e-200):
        exact = {n: scale * t if n[:3] == "fc." else t for n, t in shared.items()}
        with pytest.raises(ValueError, match=r"bias' that is not zero, got zero.*use ignore"):
            match_known_noise(model, shared.replace(exact), generator=seeded(), **known)
    pruned = shared.replace({n: t if n[:3] == "fc." else 0 * t for n, t in shared.items()})
    found = match_known_noise(model, pruned, generator=seeded(), **known)
    noise = recover_noise(model, pruned, image_shape=SHAPE)
    plain = invert_gradients(
        model, pruned, generator=seeded(), noise=noise, optimiser=DIA_STEPS,
        matching=Matching("cosine", tv_weight=1e-5), **known,
    )  # fmt: skip
    assert torch.equal(found.images, plain.images)


@pytest.mark.parametrize("protocol", [None, FedAvg(3, 0.1)])
def test_every_local_step_has_its_own_noise(protocol):
    """At the private picture, with the victims' noise, nothing is left to match."""
    model = insert_bottleneck(small_lenet(), "conv2", image_shape=SHAPE, kind="cvb")
    victims = random_victims(victims=2, batch=2)
    shared = share_gradient(model, victims, protocol=protocol, generator=seeded(5))
    steps = protocol.steps if protocol else 1
    drawn = draw_noise(model, 2, generator=seeded(5), clients=2, steps=steps)
    problem = matching_problem(
        model, shared, image_shape=SHAPE, labels=victims.labels, classes=10,
        matching=Matching("l2"), restarts=1, loss=F.cross_entropy, noise=drawn,
    )  # fmt: skip
    value, _ = problem.evaluate(victims.images.flatten(1), torch.arange(2))
    assert value.max() < 1e-20
    if steps > 1:  # one step's noise in all steps is another objective
        same = {name: tensor[:, :1].expand_as(tensor) for name, tensor in drawn.items()}
        problem = matching_problem(
            model, shared, image_shape=SHAPE, labels=victims.labels, classes=10,
            matching=Matching("l2"), restarts=1, loss=F.cross_entropy, noise=same,
        )  # fmt: skip
        assert problem.evaluate(victims.images.flatten(1), torch.arange(2))[0].min() > 1e-12


def test_steps_of_the_released_codes():
    """Rate, steps, decay and stops, as the released codes have them."""
    assert (PRECODE_STEPS.lr, PRECODE_STEPS.steps, PRECODE_STEPS.signed) == (0.01, 7_000, True)
    assert (DIA_STEPS.lr, DIA_STEPS.steps, DIA_STEPS.patience) == (0.1, 20_000, 800)
    assert (DIA_STEPS.stop_after, DIA_STEPS.stop_below) == (4_000, 1e-5)
    assert (CVB_STEPS.lr, CVB_STEPS.patience, CVB_STEPS.steps) == (1.0, 400, 20_000)


def test_the_ignoring_attack_s_defaults_are_those_written_out():
    model, victims = insert_bottleneck(small_mlp(), image_shape=SHAPE), random_victims()
    shared = share_gradient(model, victims, generator=seeded(5))
    known = {"image_shape": SHAPE, "labels": victims.labels, "max_evaluations": 3}
    short = ignore_stochastic(model, shared, generator=seeded(), **known)
    layers = attack_layers(model, "ignore_bottleneck_and_after", SHAPE)
    long = invert_gradients(
        model, shared, generator=seeded(), optimiser=DIA_STEPS,
        matching=Matching("cosine", layers=layers, tv_weight=1e-5), **known,
    )  # fmt: skip
    assert torch.equal(short.images, long.images)
    assert torch.equal(short.objective, long.objective)
