"""The bottleneck against torch.distributions, and its gradient against a naive autograd loop."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bottleneck_reference import naive_loss
from conftest import random_victims, small_mlp
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl
from torch.func import functional_call, grad, vmap

from leaklib.data import Victims
from leaklib.defenses import (
    ConvolutionalBottleneck,
    VariationalBottleneck,
    insert_bottleneck,
    kl_divergence,
)
from leaklib.gradients import (
    FedAvg,
    add_losses,
    collected_losses,
    draw_noise,
    share_gradient,
    update_function,
)
from leaklib.influence import influence_operator

DTYPE = torch.float64
SHAPE = (1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bottled(**settings):
    return insert_bottleneck(small_mlp(), image_shape=(1, 8, 8), **{"width": 5} | settings)


def naive_gradient(model, images, labels, noise, **settings):
    params = dict(model.named_parameters())
    value = naive_loss(model, images, labels, noise, **settings)
    return dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))


def test_divergence_equals_torch_distributions():
    mean = torch.randn(50, generator=seeded(), dtype=DTYPE)
    spread = 4 * torch.randn(50, generator=seeded(1), dtype=DTYPE)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = reference_kl(Normal(mean, F.softplus(spread)), prior)
    torch.testing.assert_close(kl_divergence(mean, spread, unit="nats"), expected)
    torch.testing.assert_close(kl_divergence(mean, spread), expected / math.log(2))


def test_divergence_of_the_released_convolutional_code():
    mean, spread = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    sigma = torch.log1p(spread.exp())
    expected = -0.5 * (1 + sigma - mean**2 - sigma.exp())
    torch.testing.assert_close(kl_divergence(mean, spread, unit="cvb"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_of_a_vanishing_deviation_is_finite_and_has_a_slope(dtype):
    spread = torch.tensor([-30.0, -60.0, -2000.0], dtype=dtype, requires_grad=True)
    value = kl_divergence(torch.zeros_like(spread), spread, unit="nats")
    torch.testing.assert_close(value, -0.5 - spread.detach(), rtol=1e-6, atol=0)
    value.sum().backward()
    torch.testing.assert_close(spread.grad, -torch.ones_like(spread), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_shared_gradient_equals_a_naive_loop_with_the_same_noise(reduction, chunk):
    model, victims = bottled(kl_weight=0.3), random_victims(victims=3, batch=2)
    shared = share_gradient(model, victims, reduction=reduction, generator=seeded(), chunk=chunk)
    noise = draw_noise(model, 2, generator=seeded(), clients=3)["fc.bottleneck.noise"]
    assert noise.shape == (3, 1, 2, 5)
    for v in range(3):
        expected = naive_gradient(
            model, victims.images[v], victims.labels[v], noise[v, 0], beta=0.3,
            reduction=reduction,
        )  # fmt: skip
        for name, tensor in shared.items():
            torch.testing.assert_close(tensor[v], expected[name], rtol=1e-10, atol=1e-13)


def test_every_local_step_has_noise_of_its_own():
    model, victims = bottled(kl_weight=0.3), random_victims(victims=2)
    shared = share_gradient(model, victims, protocol=FedAvg(3, 0.1), generator=seeded())
    noise = draw_noise(model, 1, generator=seeded(), steps=3, clients=2)["fc.bottleneck.noise"]
    assert not torch.equal(noise[0, 0], noise[0, 1])
    for v in range(2):
        local = bottled(kl_weight=0.3)
        start = {n: p.detach().clone() for n, p in local.named_parameters()}
        for step in range(3):
            grads = naive_gradient(
                local, victims.images[v], victims.labels[v], noise[v, step], beta=0.3
            )
            with torch.no_grad():
                for name, p in local.named_parameters():
                    p -= 0.1 * grads[name]
        for name, p in local.named_parameters():
            update = (start[name] - p.detach()) / 0.1
            torch.testing.assert_close(shared.tensors[name][v], update, rtol=1e-9, atol=1e-12)


def test_first_victim_does_not_depend_on_how_many_follow():
    model, victims = bottled(), random_victims(victims=3)
    together = share_gradient(model, victims, generator=seeded())
    alone = share_gradient(model, victims[:1], generator=seeded())
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor[0], together.tensors[name][0], rtol=1e-12, atol=1e-15)


def test_the_divergence_can_be_left_out():
    model, victims = bottled(kl_weight=0.3), random_victims(victims=1)
    noise = draw_noise(model, 1, generator=seeded())
    images, labels = victims.images[0], victims.labels[0]
    got = update_function(model, extra_losses=False)(images, labels, noise)
    expected = naive_gradient(model, images, labels, noise["fc.bottleneck.noise"][0], beta=0)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-13)


def test_ordinary_use_draws_from_the_global_generator_in_both_modes():
    layer = VariationalBottleneck((6,), width=3)
    features = torch.ones(2, 6)
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(3)
        first, second = layer(features), layer(features)
        torch.manual_seed(3)
        assert torch.equal(layer(features), first)
        assert not torch.equal(first, second)


def test_sampling_in_training_alone_leaves_the_mean_in_eval_mode():
    layer = VariationalBottleneck((6,), width=3, sampling="training")
    features = torch.randn(2, 6, generator=seeded())
    assert not torch.equal(layer(features), layer(features))
    layer.eval()
    mean = layer.encoder(features)[:, :3]
    assert torch.equal(layer(features), layer.decoder(mean))
    # and then the model is an ordinary one: no noise, no generator
    model = bottled(sampling="training")
    assert draw_noise(model, 1, generator=None) == {}
    share_gradient(model, random_victims())


def test_terms_are_collected_only_inside_and_nothing_stays_behind():
    model, images = bottled(kl_weight=0.3), random_victims().images[:, 0]
    with collected_losses() as terms:
        model(images)
        with collected_losses() as inner:
            model(images[:1])
    assert [t.shape for t in terms] == [(3,)]
    assert [t.shape for t in inner] == [(1,)]
    model(images)
    assert len(terms) == 1
    value = torch.tensor(1.0, dtype=DTYPE)
    assert add_losses(value, [], "mean") is value
    torch.testing.assert_close(add_losses(value, terms, "sum") - 1, terms[0].sum())
    torch.testing.assert_close(add_losses(value, terms, "mean") - 1, terms[0].mean())


def test_noise_is_an_input_under_vmap_and_grad():
    model = bottled()
    params = {n: p.detach() for n, p in model.named_parameters()}
    images, labels = random_victims(victims=4).images, torch.zeros(4, 1, dtype=torch.int64)
    noise = torch.randn(4, 1, 5, generator=seeded(), dtype=DTYPE)

    def loss(params, images, labels, noise):
        with collected_losses() as terms:
            out = functional_call(model, params | {"fc.bottleneck.noise": noise}, (images,))
        return add_losses(F.cross_entropy(out, labels), terms, "mean")

    batched = vmap(grad(loss), in_dims=(None, 0, 0, 0))(params, images, labels, noise)
    for v in range(4):
        alone = grad(loss)(params, images[v], labels[v], noise[v])
        for name in params:
            torch.testing.assert_close(batched[name][v], alone[name], rtol=1e-11, atol=1e-14)
    assert model.fc.bottleneck.noise is None, "the buffer must be given back"


@pytest.mark.parametrize("kl", ["bits", "nats", "cvb"])
def test_convolutional_form_by_hand(kl):
    layer = ConvolutionalBottleneck((10, 6, 4), kl_weight=0.5, kl=kl).to(DTYPE)
    features = 20 * torch.randn(3, 10, 6, 4, generator=seeded(), dtype=DTYPE)
    noise = torch.randn(layer.noise_shape(3), generator=seeded(1), dtype=DTYPE)
    assert noise.shape == (3, 5, 6, 4)
    with collected_losses() as terms:
        out = functional_call(layer, {"noise": noise}, (features,))
    first, second = layer.encoder.weight[:5], layer.encoder.weight[5:]
    mean = F.conv2d(features, first, padding=2)
    spread = F.conv2d(features, second, padding=2)
    assert spread.abs().max() > 5, "the case should clip"
    sigma = F.softplus(spread.clip(-5, 5))
    torch.testing.assert_close(out, F.conv2d(mean + noise * sigma, layer.decoder.weight))
    if kl == "cvb":
        each = -0.5 * (1 + sigma - mean**2 - sigma.exp())
    else:
        each = reference_kl(Normal(mean, sigma), Normal(torch.zeros_like(mean), 1.0))
        each = each / math.log(2) if kl == "bits" else each
    torch.testing.assert_close(terms[0].mean(), 0.5 * each.sum(1).mean())


def test_convolutional_form_of_few_channels_and_of_tokens():
    assert ConvolutionalBottleneck((3, 6, 6)).width == 8
    assert ConvolutionalBottleneck((3, 6, 6), width=2).width == 2
    layer = ConvolutionalBottleneck((12, 16), kernel=3).to(DTYPE)
    tokens = torch.randn(2, 12, 16, generator=seeded(), dtype=DTYPE)
    noise = torch.zeros(layer.noise_shape(2), dtype=DTYPE)
    out = functional_call(layer, {"noise": noise}, (tokens,))
    mean = F.conv2d(tokens.view(2, 12, 4, 4), layer.encoder.weight[:6], padding=1)
    torch.testing.assert_close(out, F.conv2d(mean, layer.decoder.weight).view(2, 12, 16))


@pytest.mark.parametrize("form", ["graph", "functional"])
def test_theory_of_a_bottleneck_without_noise_knows_its_divergence(form):
    model, victims = bottled(kl_weight=0.3, sampling="training"), random_victims(victims=2)
    operator = influence_operator(model, victims.images, victims.labels, form=form)
    shared = share_gradient(model, victims)
    for name, tensor in operator.gradient().items():
        torch.testing.assert_close(tensor, shared.tensors[name], rtol=1e-10, atol=1e-13)
    victims = Victims(victims.images.clamp(0.01, 0.99), victims.labels)  # room to move
    operator = influence_operator(model, victims.images, victims.labels, form=form)
    u, h = torch.randn(2, 1, 64, generator=seeded(), dtype=DTYPE), 1e-6
    up, down = (
        share_gradient(model, replace(victims, images=victims.images + step * u.view(2, 1, *SHAPE)))
        for step in (h, -h)
    )
    for name, tensor in operator.jtu(u).items():
        slope = (up.tensors[name] - down.tensors[name]) / (2 * h)
        torch.testing.assert_close(tensor[:, 0], slope, rtol=1e-5, atol=1e-8)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"width": 0}, "width >= 1"),
            ({"kl_weight": -1.0}, "kl_weight >= 0"),
            ({"kl_weight": float("nan")}, "kl_weight >= 0"),
            ({"kl": "bytes"}, "bits, nats, cvb.*'bytes'"),
            ({"sampling": "never"}, "always, training.*'never'"),
        ],
    )
    def test_settings(self, settings, match):
        with pytest.raises(ValueError, match=match):
            VariationalBottleneck((4,), **settings)

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"features \(batch, 4\), got \(2, 5\)"):
            VariationalBottleneck((4,), width=2)(torch.ones(2, 5))
        layer = VariationalBottleneck((4,), width=2)
        with pytest.raises(ValueError, match=r"noise of shape \(2, 2\), got \(2, 3\)"):
            functional_call(layer, {"noise": torch.zeros(2, 3)}, (torch.ones(2, 4),))
        with pytest.raises(ValueError, match="use kind='vb'"):
            ConvolutionalBottleneck((7,))
        with pytest.raises(ValueError, match="odd kernel"):
            ConvolutionalBottleneck((4, 6, 6), kernel=4)

    def test_a_stochastic_model_needs_a_generator_and_its_noise(self):
        model, victims = bottled(), random_victims()
        with pytest.raises(ValueError, match=r"noise of fc\.bottleneck\.noise.*generator=torch"):
            share_gradient(model, victims)
        with pytest.raises(ValueError, match=r"noise for \['fc\.bottleneck\.noise'\], got none"):
            update_function(model)(victims.images[0], victims.labels[0])
        with pytest.raises(ValueError, match=r"noise for no layer, got \['x.noise'\]"):
            update_function(small_mlp())(
                victims.images[0], victims.labels[0], {"x.noise": torch.zeros(1, 1)}
            )

    def test_theory_of_deterministic_models_refuses_it(self):
        from leaklib.gradients.stateless import without_side_effects

        with pytest.raises(ValueError, match=r"sampling='training' and call model.eval\(\)"):
            without_side_effects(bottled())

    def test_weights_that_are_not_finite(self):
        model = bottled()
        with torch.no_grad():
            model.fc.bottleneck.encoder.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            share_gradient(model, random_victims(), generator=seeded())
