"""A bottleneck in front of a layer of any model, and the order of what lies around it."""

import copy
import io

import pytest
import torch
from conftest import random_victims, small_lenet, small_mlp
from hosts import DTYPE, HOSTS, Tokens, seeded
from torch import nn

from leaklib.data import PrivateInputs
from leaklib.defenses import (
    ConvolutionalBottleneck,
    GaussianNoise,
    Prune,
    VariationalBottleneck,
    attack_layers,
    bottleneck_parts,
    insert_bottleneck,
    layer_order,
    noise_report,
    partial_perturbation,
)
from leaklib.gradients import match_parameters, share_gradient
from leaklib.influence.objective import differentiable_attention
from leaklib.models import build

SHAPE = (1, 8, 8)

ORDER = {
    "mlp": ("hidden1", "fc"),
    "lenet": ("conv1", "conv2", "conv3", "fc"),
    "nested": ("body.first", "body.second", "head.1"),
}


@pytest.fixture(params=list(HOSTS), scope="module")
def host(request):
    make, before, shape, features = HOSTS[request.param]
    model = make()
    changed = insert_bottleneck(model, before, image_shape=shape, width=4)
    return model, changed, before, shape, features


def test_the_layer_is_wrapped_and_nothing_else_changes(host):
    model, changed, before, shape, features = host
    pair = changed.get_submodule(before)
    assert isinstance(pair.bottleneck, VariationalBottleneck)
    assert pair.bottleneck.feature_shape == features
    assert changed.training == pair.training == pair.bottleneck.training
    theirs = {n.replace(f"{before}.layer", before): p for n, p in changed.named_parameters()}
    mine = dict(model.named_parameters())
    assert {n for n in theirs if n not in mine} == {
        f"{before}.bottleneck.{half}.{kind}"
        for half in ("encoder", "decoder")
        for kind in ("weight", "bias")
    }
    for name, parameter in mine.items():
        assert torch.equal(parameter, theirs[name])
        assert parameter is not theirs[name], "the old model must not share its weights"
    assert all(p.dtype == DTYPE for p in changed.parameters())
    images = torch.rand(3, *shape, dtype=DTYPE)
    assert changed(images).shape == model(images).shape


def test_an_identity_bottleneck_gives_the_old_model(host):
    model, changed, before, shape, _ = host
    changed = copy.deepcopy(changed)
    pair = changed.get_submodule(before)
    pair.bottleneck = nn.Identity()
    images = torch.rand(2, *shape, dtype=DTYPE)
    torch.testing.assert_close(changed(images), model(images), rtol=1e-12, atol=1e-14)


def test_per_victim_noise_batched_equals_looped(host):
    _, changed, _, shape, _ = host
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(2, 1, *shape, generator=generator, dtype=DTYPE)
    victims = PrivateInputs(inputs, torch.tensor([[1], [2]]))
    with differentiable_attention():  # torch's fused kernel has no batching rule
        together, looped = (
            share_gradient(
                changed, victims, generator=torch.Generator().manual_seed(0), chunk=chunk
            )
            for chunk in (2, 1)
        )
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, looped.tensors[name], rtol=1e-8, atol=1e-12)


def test_every_parameter_has_one_place(host):
    _, changed, before, shape, _ = host
    parts = bottleneck_parts(changed, shape)
    everything = parts.before + parts.encoder + parts.decoder + parts.after
    trainable = [n for n, p in changed.named_parameters() if p.requires_grad]
    assert sorted(everything) == sorted(trainable)
    assert len(everything) == len(set(everything))
    assert all(n.startswith(f"{before}.bottleneck.encoder") for n in parts.encoder)
    assert all(n.startswith(f"{before}.bottleneck.decoder") for n in parts.decoder)
    assert {n for n in trainable if n.startswith(f"{before}.layer")} <= set(parts.after)


@pytest.mark.parametrize("name", list(ORDER))
def test_order_of_execution(name):
    make, before, shape, _ = HOSTS[name]
    model = make()
    assert layer_order(model, shape) == ORDER[name]
    changed = insert_bottleneck(model, before, image_shape=shape, width=3)
    order = layer_order(changed, shape)
    new = (f"{before}.bottleneck.encoder", f"{before}.bottleneck.decoder")
    assert [n for n in order if n not in new] == [
        f"{before}.layer" if n == before else n for n in ORDER[name]
    ]


def test_parameters_of_the_model_itself_are_sorted_by_use():
    model = insert_bottleneck(seeded(Tokens), "classifier.out", image_shape=SHAPE, width=3)
    parts = bottleneck_parts(model, SHAPE)
    assert {"cls", "positions", "embed.weight", "classifier.norm.weight"} <= set(parts.before)
    assert "blocks.1.self_attn.out_proj.weight" in parts.before  # never called by itself
    assert set(parts.after) == {"scale", "classifier.out.layer.weight", "classifier.out.layer.bias"}


def test_a_bottleneck_in_the_middle():
    make, before, shape, _ = HOSTS["nested"]
    model = insert_bottleneck(make(), before, image_shape=shape, width=3)
    parts = bottleneck_parts(model, shape)
    assert parts.before == ("body.first.weight", "body.first.bias")
    assert set(parts.after) == {
        "body.second.layer.weight", "body.second.layer.bias", "head.1.weight", "head.1.bias",
        "spare.weight", "spare.bias",
    }  # fmt: skip


def test_a_branch_that_ran_before_counts_as_before_though_it_bypasses_the_bottleneck():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.fc, self.side, self.body = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            x, y = self.body(x), self.side(x)
            return self.fc(x) + self.late(y)

    model = insert_bottleneck(Bypass(), "fc", image_shape=(4,), width=3)
    parts = bottleneck_parts(model, (4,))
    assert set(parts.before) == {"body.weight", "body.bias", "side.weight", "side.bias"}
    assert {"late.weight", "late.bias"} <= set(parts.after)


def test_presets_of_the_attacker():
    model = insert_bottleneck(small_mlp(), image_shape=SHAPE, width=3)
    names = tuple(n for n, _ in model.named_parameters())
    before = ("hidden1.weight", "hidden1.bias")
    encoder = ("fc.bottleneck.encoder.weight", "fc.bottleneck.encoder.bias")
    assert attack_layers(model, "all") == names
    assert attack_layers(model, image_shape=SHAPE) == before
    assert attack_layers(model, "ignore_decoder_and_after", SHAPE) == before + encoder
    assert match_parameters(names, attack_layers(model, image_shape=SHAPE)) == before


def test_published_size_and_default_start():
    model = insert_bottleneck(build("mlp"), image_shape=(3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == 4_994_570
    assert model.fc.bottleneck.encoder.weight.shape == (512, 1024)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = nn.Linear(1024, 512).weight
    assert torch.equal(model.fc.bottleneck.encoder.weight, expected)


def test_seed_decides_and_the_global_generator_stays():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        insert_bottleneck(small_mlp(), image_shape=SHAPE, width=3, seed=seed) for seed in (1, 1, 2)
    )
    layer_order(first, SHAPE)
    bottleneck_parts(first, SHAPE)
    assert torch.equal(torch.rand(3), expected)
    weights = [m.fc.bottleneck.encoder.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_state_is_weights_alone():
    model = insert_bottleneck(small_mlp(), image_shape=SHAPE, width=3, seed=1)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin = insert_bottleneck(small_mlp(), image_shape=SHAPE, width=3, seed=2)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert "fc.bottleneck.noise" not in model.state_dict()


def test_convolutional_form_and_several_bottlenecks():
    model = insert_bottleneck(small_lenet(), "conv2", image_shape=SHAPE, kind="cvb")
    assert isinstance(model.conv2.bottleneck, ConvolutionalBottleneck)
    both = insert_bottleneck(model, "fc", image_shape=SHAPE, width=3)
    with pytest.raises(ValueError, match=r"one bottleneck, got \['conv2.*name it"):
        bottleneck_parts(both, SHAPE)
    assert bottleneck_parts(both, SHAPE, bottleneck="conv2.bottleneck").before == (
        "conv1.weight", "conv1.bias",
    )  # fmt: skip
    share_gradient(both, random_victims(), generator=torch.Generator().manual_seed(0))


def test_inputs_that_are_no_floating_point_numbers():
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 10))
    example = torch.randint(9, (2, 3))
    model = insert_bottleneck(words, "2", example=example, width=3)
    assert model(example).shape == (2, 10)
    assert bottleneck_parts(model, example=example).before == ("0.weight",)


class TestPartialPerturbation:
    def model(self):
        return insert_bottleneck(small_mlp(hidden=(12, 7)), image_shape=SHAPE, width=3)

    @pytest.mark.parametrize("defense", [GaussianNoise(0.1), Prune(0.9, scope="tensor")])
    def test_bottleneck_and_head_stay_bit_by_bit(self, defense):
        model, victims = self.model(), random_victims()
        generator = torch.Generator().manual_seed(0)
        shared = share_gradient(model, victims, generator=generator)
        released = partial_perturbation(model, defense, image_shape=SHAPE)(
            shared, generator=generator
        )
        for name, tensor in released.items():
            assert torch.equal(tensor, shared.tensors[name]) == name.startswith("fc."), name
        report = noise_report(shared, released)
        sizes = {n: t[0].numel() for n, t in shared.items()}
        covered = sum(size for n, size in sizes.items() if n.startswith("hidden"))
        assert report.touched_share.tolist() == [covered / sum(sizes.values())] * 3

    def test_strength_is_relative_to_the_layers_it_covers(self):
        model, victims = self.model(), random_victims()
        shared = share_gradient(model, victims, generator=torch.Generator().manual_seed(0))
        defense = partial_perturbation(
            model, GaussianNoise(0.5, relative_to="rms"), image_shape=SHAPE
        )
        report = noise_report(shared, defense(shared, generator=torch.Generator().manual_seed(1)))
        torch.testing.assert_close(
            torch.tensor(report.noise_to_rms), torch.full((3,), 0.5, dtype=DTYPE), rtol=0.1, atol=0
        )
        hidden = torch.cat([shared.tensors[n].flatten(1) for n in defense.layers], 1)
        torch.testing.assert_close(
            torch.tensor(report.touched_rms), hidden.square().mean(1).sqrt(), rtol=1e-12, atol=0
        )


class TestBadInput:
    @pytest.mark.parametrize("name", ["fc9", "", "hidden1.weight"])
    def test_unknown_layer(self, name):
        with pytest.raises(ValueError, match=r"name of a layer.*known: flatten, hidden1"):
            insert_bottleneck(small_mlp(), name, image_shape=SHAPE)

    def test_layer_that_is_not_called(self):
        make, _, shape, _ = HOSTS["nested"]
        with pytest.raises(ValueError, match="'spare' to be called once.*called 0 times"):
            insert_bottleneck(make(), "spare", image_shape=shape)

    def test_layer_that_is_called_twice(self):
        same = nn.Linear(4, 4)
        with pytest.raises(ValueError, match="called 2 times"):
            insert_bottleneck(nn.Sequential(same, nn.ReLU(), same), "0", image_shape=(4,))

    def test_layer_of_two_tensors(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix = nn.Bilinear(4, 4, 3)

            def forward(self, x):
                return self.mix(x, x)

        with pytest.raises(ValueError, match=r"one tensor \(batch, features\), got \[\(2, 4\), "):
            insert_bottleneck(Two(), "mix", image_shape=(4,))

    def test_settings(self):
        with pytest.raises(ValueError, match="unknown setting 'widht'.*width"):
            insert_bottleneck(small_mlp(), image_shape=SHAPE, widht=3)
        with pytest.raises(ValueError, match="unknown setting 'kernel'"):
            insert_bottleneck(small_mlp(), image_shape=SHAPE, kernel=3)
        with pytest.raises(ValueError, match="vb, cvb, got 'cnn'"):
            insert_bottleneck(small_mlp(), image_shape=SHAPE, kind="cnn")
        with pytest.raises(ValueError, match="got neither"):
            insert_bottleneck(small_mlp())
        with pytest.raises(ValueError, match="got both"):
            insert_bottleneck(small_mlp(), image_shape=SHAPE, example=torch.ones(1, *SHAPE))

    def test_places_without_a_bottleneck(self):
        with pytest.raises(ValueError, match="one bottleneck, got none; insert_bottleneck"):
            bottleneck_parts(small_mlp(), SHAPE)
        first = insert_bottleneck(small_mlp(), "hidden1", image_shape=SHAPE, width=3)
        with pytest.raises(ValueError, match="it is the first"):
            partial_perturbation(first, Prune(0.5), image_shape=SHAPE)
        with pytest.raises(ValueError, match=r"preset among all, .*'some'"):
            attack_layers(first, "some", SHAPE)


class TwoNames(nn.Module):
    """A layer that the forward pass reaches by another name than `fc`."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), self.fc)

    def forward(self, x):
        return self.net(x)


def test_a_bottleneck_that_would_never_run_is_refused():
    with pytest.raises(ValueError, match="'fc' to be reached by this name"):
        insert_bottleneck(TwoNames(), before="fc", image_shape=(1, 8, 8))


def test_the_layer_it_was_put_before_names_a_bottleneck():
    model = insert_bottleneck(small_mlp(), image_shape=(1, 8, 8), width=3)
    parts = bottleneck_parts(model, (1, 8, 8), bottleneck="fc")
    assert parts == bottleneck_parts(model, (1, 8, 8))
    with pytest.raises(ValueError, match=r"'hidden1'; known: \['fc.bottleneck'\]"):
        bottleneck_parts(model, (1, 8, 8), bottleneck="hidden1")


@pytest.mark.parametrize("measure", [insert_bottleneck, layer_order])
def test_images_that_the_model_does_not_accept(measure):
    with pytest.raises(ValueError, match=r"\(2, 1, 9, 9\); the model answered"):
        measure(small_mlp(), image_shape=(1, 9, 9))
