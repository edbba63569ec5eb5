"""The features from the encoder's gradient, and a picture that has them."""

import pytest
import torch
from conftest import random_victims, small_lenet, small_mlp
from torch import nn

from leaklib.attacks import AdamSettings, Matching, encoder_features, feature_inversion
from leaklib.attacks.features_before import features_before
from leaklib.defenses import GaussianNoise, insert_bottleneck, partial_perturbation
from leaklib.gradients import FedAvg, share_gradient

SHAPE = (1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bottled(model=None, before="fc", **settings):
    settings = {"width": 5, "kl_weight": 0.3} | settings
    return insert_bottleneck(model or small_mlp(), before, image_shape=SHAPE, **settings)


def private_input(model, images, name):
    """What enters a layer, by a plain hook."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0].flatten(1)


@pytest.mark.parametrize("host", [small_mlp, small_lenet])
def test_features_are_exact_whatever_the_noise(host):
    model, victims = bottled(host()), random_victims(victims=3)
    expected = private_input(model, victims.images[:, 0], "fc.bottleneck")
    for seed in range(5):
        shared = share_gradient(model, victims, generator=seeded(seed))
        ppp = partial_perturbation(model, GaussianNoise(10.0), image_shape=SHAPE)
        released = ppp(shared, generator=seeded(1))
        found = encoder_features(model, released, image_shape=SHAPE)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def linear_model():
    """64 pixels to 64 features without an activation: nothing is lost."""
    model = small_mlp(hidden=(64,), activation="identity")
    nn.init.orthogonal_(model.hidden1.weight, generator=seeded(3))
    return model


@pytest.mark.parametrize("start", ["normal", "grey"])
def test_a_picture_is_exact_where_the_layers_before_are_injective(start):
    model, victims = bottled(linear_model()), random_victims(victims=3)
    shared = share_gradient(model, victims, generator=seeded(2))
    ppp = partial_perturbation(model, GaussianNoise(10.0), image_shape=SHAPE)
    found = feature_inversion(
        model, ppp(shared, generator=seeded(1)), image_shape=SHAPE, generator=seeded(),
        tv_weight=0.0, start=start, max_evaluations=100,
    )  # fmt: skip
    torch.testing.assert_close(found.images, victims.images, rtol=1e-6, atol=1e-7)
    assert torch.equal(found.labels, victims.labels)


@pytest.mark.parametrize(
    ("host", "relu"),
    [(lambda: small_mlp(activation="relu"), "act1"), (small_lenet, None)],
)
def test_the_function_before_is_the_relus_input_or_the_features(host, relu):
    model, victims = bottled(host()), random_victims(victims=2)
    f, follows = features_before(model, "fc.bottleneck", SHAPE)
    images = victims.images[:, 0]
    assert follows == (relu is not None)
    torch.testing.assert_close(f(images), private_input(model, images, relu or "fc.bottleneck"))


@pytest.mark.parametrize("matching", [None, Matching("cosine", tv_weight=0.2, score_noises=0)])
def test_objective_by_hand(matching):
    """ReLU: h where it is on, not above 0 where it is off; TV and the cosine beside it."""
    model, victims = bottled(small_mlp(activation="relu"), kl_weight=0.0), random_victims()
    shared = share_gradient(model, victims, generator=seeded(2))
    start = torch.rand(3, 1, *SHAPE, generator=seeded(4), dtype=torch.float64)
    found = feature_inversion(
        model, shared, image_shape=SHAPE, generator=seeded(), start={"images": start},
        tv_weight=0.2, feature_weight=3.0, matching=matching, max_evaluations=1,
        optimiser=AdamSettings(), labels=victims.labels,
    )  # fmt: skip
    torch.testing.assert_close(found.images, start)
    for v in range(3):
        h = private_input(model, victims.images[v], "fc.bottleneck")[0]
        z = private_input(model, start[v], "act1")[0]
        wrong = sum((z[i] - h[i]) ** 2 for i in range(12) if h[i] > 0 or z[i] > 0)
        x = start[v, 0, 0]
        tv = (x[1:] - x[:-1]).abs().mean() + (x[:, 1:] - x[:, :-1]).abs().mean()
        expected = 3 * wrong / h.square().sum() + 0.2 * tv
        if matching is None:
            torch.testing.assert_close(found.objective[v], expected)
        else:  # the noise is the attacker's: only its bounds are known
            assert expected < found.objective[v] < expected + 2


def test_more_of_the_picture_with_the_gradients_than_without():
    model, victims = bottled(small_mlp(hidden=(20,), activation="relu")), random_victims()
    shared = share_gradient(model, victims, generator=seeded(2))
    settings = {"image_shape": SHAPE, "max_evaluations": 300, "labels": victims.labels}
    adam = AdamSettings(lr=0.05, steps=300)
    errors = []
    for matching in (None, Matching("cosine")):
        found = feature_inversion(
            model, shared, generator=seeded(), tv_weight=0.0, optimiser=adam, matching=matching,
            **settings,
        )  # fmt: skip
        errors.append((found.images - victims.images).square().mean((1, 2, 3, 4)))
    assert bool((errors[1] < 0.5 * errors[0]).all()), errors


def test_restarts_and_victims_do_not_influence_one_another():
    model, victims = bottled(), random_victims(victims=2)
    shared = share_gradient(model, victims, generator=seeded(2))
    start = torch.rand(4, 1, *SHAPE, generator=seeded(4), dtype=torch.float64)
    settings = {"image_shape": SHAPE, "generator": seeded(), "max_evaluations": 20}
    both = feature_inversion(model, shared, start={"images": start}, restarts=2, **settings)
    for v in range(2):
        one = shared.replace({n: t[v : v + 1] for n, t in shared.items()})
        tries = [
            feature_inversion(model, one, start={"images": start[r : r + 1]}, **settings)
            for r in (2 * v, 2 * v + 1)
        ]
        best = min(tries, key=lambda found: float(found.objective))
        torch.testing.assert_close(both.images[v], best.images[0], rtol=1e-6, atol=1e-8)


class TestRefusals:
    def attack(self, model, *, batch=1, change=lambda shared: shared, **settings):
        victims = random_victims(victims=2, batch=batch)
        shared = change(share_gradient(model, victims, generator=seeded(), **settings))
        return feature_inversion(model, shared, image_shape=SHAPE, generator=seeded())

    def test_what_cannot_be_divided(self):
        with pytest.raises(ValueError, match="expected one bottleneck"):
            self.attack(small_mlp())
        lenet = insert_bottleneck(small_lenet(), "flatten", image_shape=SHAPE, kind="cvb")
        with pytest.raises(ValueError, match="fully connected with a bias"):
            self.attack(lenet)
        with pytest.raises(ValueError, match="batch 1 and one local step, got batch 2"):
            self.attack(bottled(), batch=2)
        with pytest.raises(ValueError, match="3 steps"):
            self.attack(bottled(), protocol=FedAvg(3, 0.1))
        with pytest.raises(ValueError, match="missing fc.bottleneck.encoder.weight"):
            self.attack(bottled(), change=lambda s: s.select(["hidden1", "fc.layer"]))

    def test_zeros(self):
        with pytest.raises(ValueError, match="that is not zero, got zero for victim 0"):
            self.attack(
                bottled(), change=lambda s: s.replace({n: 0 * t for n, t in s.items()})
            )
        model = small_mlp(activation="relu")
        nn.init.constant_(model.hidden1.bias, -100.0)
        with pytest.raises(ValueError, match="no neuron"):
            self.attack(bottled(model))

    def test_settings(self):
        model, victims = bottled(), random_victims()
        shared = share_gradient(model, victims, generator=seeded())
        settings = {"image_shape": SHAPE, "generator": seeded()}
        with pytest.raises(ValueError, match="feature_weight > 0"):
            feature_inversion(model, shared, feature_weight=0.0, **settings)
        with pytest.raises(ValueError, match="AdamSettings"):
            feature_inversion(model, shared, matching=Matching("cosine"), **settings)
        few = shared.select(["fc"])
        with pytest.raises(ValueError, match="leave matching out"):
            feature_inversion(
                model, few, matching=Matching("cosine"), optimiser=AdamSettings(), **settings
            )
