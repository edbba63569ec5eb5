"""The layer-wise hybrid attack: its objective written out by hand, its options, its refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacks.dense_layers import gradient_rows, weight_rows
from conftest import random_victims
from torch import nn

from leaklib.attacks import Correction, hybrid, rgap
from leaklib.attacks.hybrid import attack as attack_module
from leaklib.attacks.hybrid import correction as correction_module
from leaklib.attacks.hybrid.settings import PUBLISHED, correction_of
from leaklib.data import load_images, make_victims
from leaklib.gradients import share_gradient
from leaklib.metrics import psnr_db
from leaklib.models import build

SHAPE = (2, 8, 8)
DTYPE = torch.float64
NONE = Correction(1.0, 1.0, 1.0, 0)


def network(name="cnn3_c1", **settings):
    return build(name, input_shape=SHAPE, classes=5, seed=10, **settings).to(DTYPE)


def setting(name="cnn3_c1", victims=2, **settings):
    model = network(name, **settings)
    private = random_victims(SHAPE, victims=victims, classes=5)
    return model, private, share_gradient(model, private)


def attack(model, shared, private, **settings):
    return hybrid(model, shared, image_shape=SHAPE, labels=private.labels, **settings)


def test_without_steps_it_is_the_recursion():
    model, private, shared = setting()
    found = attack(model, shared, private, corrections=[NONE])
    plain = rgap(model, shared, image_shape=SHAPE, labels=private.labels)
    assert torch.equal(found.images, plain.images)
    assert found.evaluations.tolist() == [0, 0]


def test_the_objective_is_the_papers(monkeypatch):
    """J of one layer and its slope, by autograd over a plain loop and dense rows."""
    model, private, shared = setting(last="tanh")
    seen = {}

    def spy(behind, target, **settings):
        problem = original(behind, target, **settings)
        seen[settings["image_shape"]] = (problem, target)
        return problem

    original = correction_module.matching_problem
    monkeypatch.setattr(correction_module, "matching_problem", spy)
    weights = Correction(3.0, 0.7, 0.4, 1)
    attack(model, shared, private, corrections=[NONE, weights])
    (problem, target) = seen[(6, 6, 6)]
    names = ["conv2.weight", "fc.weight", "fc.bias"]
    assert list(target.names) == names
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 6 * 36, generator=generator, dtype=DTYPE) - 0.5
    value, slope = problem.evaluate(x, torch.arange(2))

    behind = nn.Sequential(model.conv2, model.act2, model.flatten, model.fc, model.last)
    layer = {
        "kind": "conv", "name": "conv2", "weight": model.conv2.weight.detach().numpy(),
        "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "bias": None,
    }  # fmt: skip
    with torch.no_grad():
        layer_input = model.act1(model.conv1(private.images[:, 0]))
    for victim in range(2):
        dummy = x[victim].view(1, 6, 6, 6).clone().requires_grad_()
        loss = F.cross_entropy(behind(dummy), private.labels[victim])
        params = [dict(model.named_parameters())[n] for n in names]
        grads = torch.autograd.grad(loss, params, create_graph=True)
        total = 0
        for name, grad in zip(names, grads, strict=True):
            g = shared.tensors[name][victim]
            total = total + 3.0 * (1 - (grad * g).sum() / (grad.norm() * g.norm()))
        down = (dummy[:, :, 1:] - dummy[:, :, :-1]).abs().mean()
        across = (dummy[..., 1:] - dummy[..., :-1]).abs().mean()
        total = total + 0.7 * (down + across)
        z, k = truth(behind, layer_input[victim : victim + 1], private.labels[victim])
        rows = np.concatenate(
            [weight_rows(layer, (6, 6, 6)), gradient_rows(layer, (6, 6, 6), k.numpy().ravel())]
        )
        right = np.concatenate(
            [z.numpy().ravel(), shared.tensors["conv2.weight"][victim].numpy().ravel()]
        )
        misfit = torch.as_tensor(rows) @ dummy.flatten() - torch.as_tensor(right)
        total = total + 0.4 * misfit.square().sum()
        (want,) = torch.autograd.grad(total, dummy)
        torch.testing.assert_close(value[victim], total.detach(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(slope[victim], want.flatten(), rtol=1e-7, atol=1e-9)


def truth(behind, layer_input, label):
    """Pre-activation of conv2 and ∂L/∂z, which the recursion finds exactly here."""
    z = behind[0](layer_input).detach().requires_grad_()
    value = z
    for module in behind[1:]:
        value = module(value)
    (k,) = torch.autograd.grad(F.cross_entropy(value, label), z)
    return z.detach()[0], k[0]


def test_batched_is_one_at_a_time():
    model, private, shared = setting(victims=3)
    steps = [Correction(1.0, 1.0, 0.05, 5)]
    together = attack(model, shared, private, corrections=steps)
    for victim in range(3):
        one = shared.replace({n: t[victim : victim + 1] for n, t in shared.items()})
        alone = attack(model, one, private[victim], corrections=steps)
        torch.testing.assert_close(alone.images[0], together.images[victim], rtol=1e-7, atol=1e-9)
    assert together.evaluations.tolist() == [10, 10, 10]


def test_an_exact_layer_may_be_left_alone():
    model, private, shared = setting("cnn2_c1")
    steps = [Correction(1.0, 1.0, 0.05, 30)]
    corrected = attack(model, shared, private, corrections=steps)
    kept = attack(model, shared, private, corrections=steps, skip_exact=True)
    error = lambda found: (found.images - private.images).abs().max()  # noqa: E731
    assert float(error(kept)) < 1e-9
    assert float(error(corrected)) > 1e-4  # the total variation pulls an exact answer away
    assert kept.evaluations.tolist() == [0, 0]


def test_exact_rows_stay_beside_a_row_that_is_not():
    model, private, shared = setting("cnn2_c1", victims=3)
    noisy = {n: t.clone() for n, t in shared.items()}
    noise = torch.randn(noisy["conv1.weight"][1].shape, generator=torch.Generator().manual_seed(1))
    noisy["conv1.weight"][1] += noisy["conv1.weight"][1].std() * noise
    steps = [Correction(1.0, 1.0, 0.05, 5)]
    found = attack(model, shared.replace(noisy), private, corrections=steps, skip_exact=True)
    assert found.evaluations.tolist() == [0, 5, 0]
    error = (found.images - private.images).flatten(1).abs().amax(1)
    assert float(error[[0, 2]].max()) < 1e-9 < float(error[1])


def test_the_objective_is_that_of_the_corrected_inputs():
    model, private, shared = setting("cnn2_c1")
    plain = attack(model, shared, private, corrections=[NONE])
    found = attack(model, shared, private, corrections=[Correction(1.0, 1.0, 0.05, 30)])
    assert float(plain.objective.max()) < 1e-8
    assert bool((found.layers[0].residual > 1e-5).all())
    assert torch.equal(found.objective, found.layers[0].residual)


def test_one_activation_in_two_places_is_corrected_as_two():
    model, private, shared = setting(victims=2)
    steps = [Correction(1.0, 1.0, 0.05, 3)]
    want = attack(model, shared, private, corrections=steps)
    model.act2 = model.act1
    found = attack(model, shared, private, corrections=steps)
    assert torch.equal(found.images, want.images)


def test_the_image_prior_keeps_every_equation():
    model = build("cnn2_c2", input_shape=(3, 16, 16), seed=10).to(DTYPE)
    private = make_victims(load_images("patches", 2, size=16)).to(dtype=DTYPE)
    shared = share_gradient(model, private)
    settings = {"image_shape": (3, 16, 16), "labels": private.labels, "corrections": [NONE]}
    plain = hybrid(model, shared, **settings)
    smooth = hybrid(model, shared, image_prior="null space", **settings)
    assert plain.layers[0].deficit < 0
    z = [model.conv1(found.images[:, 0]) for found in (plain, smooth)]
    torch.testing.assert_close(z[0], z[1], rtol=1e-7, atol=1e-8)
    again = share_gradient(model, type(private)(smooth.images.clamp(0, 1), private.labels))
    assert again.names == shared.names
    better = psnr_db(smooth.images, private.images) > psnr_db(plain.images, private.images)
    assert bool(better.all())
    assert float((smooth.images - smooth.images.clamp(0, 1)).abs().max()) < 0.05


def test_the_pull_back_fills_a_deficit():
    """A deficient second layer, more virtual constraints in front of it than it lacks."""
    layers = ((12, 3, 1, 1), (4, 3, 1, 0))
    model = build("chain", input_shape=SHAPE, classes=5, layers=layers, bias=False,
                  head_bias=True).to(DTYPE)  # fmt: skip
    private = random_victims(SHAPE, victims=2, classes=5)
    shared = share_gradient(model, private)
    plain = attack(model, shared, private, corrections=[NONE])
    pulled = attack(model, shared, private, corrections=[NONE], pull_back=True)
    assert plain.layers[1].deficit < 0
    assert float((plain.images - private.images).abs().max()) > 1e-2
    assert float((pulled.images - private.images).abs().max()) < 1e-8


def test_labels_are_read_off_the_last_layer():
    model, private, shared = setting(victims=4)
    found = hybrid(model, shared, image_shape=SHAPE, corrections=[NONE])
    assert torch.equal(found.labels, private.labels)


def test_corrections_go_from_the_image_on_and_the_last_repeats():
    assert [correction_of(PUBLISHED, place).steps for place in range(4)] == [
        10_000, 8_000, 1_000, 1_000,
    ]  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "decibels", "tolerance"),
    [
        ("cnn2_c1", [150, 150, 150, 150], 4),
        ("cnn2_c2", [18.0, 15.4], 0.05),
        ("cnn3_c2", [16.3, 13.4, 14.3, 12.9], 0.06),
        ("cnn4_c2", [17.3, 15.4, 15.3, 13.3], 0.6),
    ],
)
def test_linear_systems_alone_on_the_victims_of_precode(name, decibels, tolerance):
    """Measured with the released code's solver; there tanh is clipped at 0.9999."""
    try:
        pictures = load_images("cifar10-victims", indices=range(len(decibels)))
    except FileNotFoundError:
        pytest.skip("needs cifar10-victims under the data root")
    private = make_victims(pictures)
    model = build(name, seed=10, normalisation=((0.5,) * 3, (1.0,) * 3))
    found = hybrid(
        model, share_gradient(model, private), image_shape=(3, 32, 32), labels=private.labels,
        corrections=[NONE],
    )  # fmt: skip
    got = psnr_db(found.images, private.images).flatten()
    np.testing.assert_allclose(got.numpy(), decibels, rtol=0, atol=tolerance)


@pytest.mark.data
def test_the_image_prior_on_the_victims_of_precode():
    try:
        pictures = load_images("cifar10-victims", indices=range(4))
    except FileNotFoundError:
        pytest.skip("needs cifar10-victims under the data root")
    private = make_victims(pictures)
    model = build("cnn2_c2", seed=10, normalisation=((0.5,) * 3, (1.0,) * 3))
    found = hybrid(
        model, share_gradient(model, private), image_shape=(3, 32, 32), labels=private.labels,
        corrections=[NONE], image_prior="null space",
    )  # fmt: skip
    got = psnr_db(found.images, private.images).flatten()
    np.testing.assert_allclose(got.numpy(), [30.8, 28.4, 27.5, 26.8], rtol=0, atol=0.3)


class TestBadInput:
    def test_nested_layers(self):
        model = network("cnn2_c1")
        nested = nn.Sequential(nn.Sequential(model.conv1, model.act1), model.flatten, model.fc)
        private = random_victims(SHAPE, classes=5)
        shared = share_gradient(nested, private)
        with pytest.raises(ValueError, match="layer '0.0' among the model's children.*flatten"):
            attack(nested, shared, private, corrections=[Correction(1.0, 1.0, 1.0, 1)])

    def test_a_model_that_is_no_sequence(self):
        model = network("cnn2_c1")
        private = random_victims(SHAPE, classes=5)
        shared = share_gradient(model, private)

        class Wrapped(nn.Module):
            pass

        with pytest.raises(ValueError, match=r"nn\.Sequential.*Wrapped"):
            attack(Wrapped(), shared, private)

    @pytest.mark.parametrize(
        ("layers", "classes", "settings", "message"),
        [
            ([nn.LeakyReLU(0.2)], 1, {}, "two logits, got one.*rgap"),
            ([nn.ReLU()], 5, {}, "invertible activations, got .*ReLU.*'1'.*LeakyReLU"),
            (
                [nn.AvgPool2d(1), nn.Tanh()], 5, {"image_prior": "null space"},
                "image_prior 'none' with layer '1'.*'0'",
            ),
        ],
    )  # fmt: skip
    def test_chains_that_cannot_be_corrected(self, layers, classes, settings, message, monkeypatch):
        monkeypatch.setattr(attack_module, "open_recursion", None)  # before any work
        parts = nn.Conv2d(2, 4, 3), *layers, nn.Flatten(), nn.Linear(144, classes)
        model = nn.Sequential(*parts).to(DTYPE)
        private = random_victims(SHAPE, classes=5)
        shared = share_gradient(network("cnn2_c1"), private)
        with pytest.raises(ValueError, match=message):
            attack(model, shared, private, **settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"corrections": []}, "at least one correction"),
            ({"image_prior": "smooth"}, "image_prior 'none' or 'null space'"),
        ],
    )
    def test_settings(self, settings, message):
        model, private, shared = setting("cnn2_c1")
        with pytest.raises(ValueError, match=message):
            attack(model, shared, private, **settings)

    def test_negative_weights(self):
        with pytest.raises(ValueError, match="weights >= 0"):
            Correction(-1.0, 0.0, 0.0, 5)
