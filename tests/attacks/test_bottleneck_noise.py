"""The victim's noise, read off encoder and decoder: against the noise that was drawn."""

import pytest
import torch
from conftest import random_victims, small_lenet, small_mlp

from leaklib.attacks import AdamSettings, Matching, invert_gradients, recover_noise
from leaklib.defenses import GaussianNoise, insert_bottleneck, partial_perturbation
from leaklib.gradients import draw_noise, share_gradient, update_function
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
