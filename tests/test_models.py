"""The registry: sizes of the papers' networks, normalisation, bad input."""

import doctest
import math
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from leaklib.data import load_images
from leaklib.models import (
    available_models,
    build,
    copa_networks,
    parameter_count,
    register,
    registry,
)
from leaklib.models.registry import NORMALISATIONS


def test_doctests():
    assert doctest.testmod(registry).failed == 0


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("lenet", {"classes": 100}, 85_036),
        ("lenet", {}, 15_826),
        ("lenet4", {"input_shape": (1, 28, 28)}, 17_038),
        ("lenet4", {}, 19_438),
        ("linear", {"input_shape": (1, 28, 28)}, 7_850),
        ("mlp", {}, 4_206_602),
        # the other perceptron of the PPP dossier: 3072-512-512-10 without biases
        ("mlp", {"hidden": (512, 512), "bias": False}, 3072 * 512 + 512 * 512 + 512 * 10),
        # as released there: depth 3 is three hidden layers
        (
            "mlp",
            {"hidden": (512,) * 3, "bias": False, "activation": "gelu"},
            3072 * 512 + 2 * 512 * 512 + 512 * 10,
        ),
        ("cnn", {}, 16 * (3 * 25 + 1) + 32 * (16 * 25 + 1) + 64 * (32 * 25 + 1) + 65 * 10),
        ("cnn", {}, 65_962),
        (
            "vit",
            {},
            # patches, class token and positions, four blocks of six maps and two norms, norm, fc
            48 * 256 + 66 * 256 + 4 * (6 * 256**2 + 4 * 256) + 2 * 256 + 256 * 10,
        ),
        ("vit", {}, 1_609_216),
        ("convnet", {}, 2_904_970),
        # a bias and no normalisation: 2 numbers per channel fewer
        ("convnet", {"norm": "none"}, 2_904_970 - 2 * 64 * (1 + 2 + 2 + 5 * 4)),
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"norm": "group"}, 11_173_962),
        ("resnet18", {"input_shape": (1, 28, 28)}, 11_172_810),
        # torchvision's 11,689,512 of 1000 classes, with the last layer for 10
        ("resnet18", {"norm": "group", "stem": "imagenet"}, 11_689_512 - 513 * 1000 + 513 * 10),
    ],
)
def test_parameter_counts_of_the_papers(name, settings, count):
    assert parameter_count(build(name, **settings)) == count


def layer_shapes(model, shape):
    shapes, hooks = {}, []
    for name, layer in model.named_children():
        keep = lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape[1:])})  # noqa: E731
        hooks.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    return shapes


def test_layer_shapes():
    lenet = layer_shapes(build("lenet", classes=100), (3, 32, 32))
    assert [lenet[f"conv{i}"] for i in (1, 2, 3)] == [(12, 16, 16), (12, 8, 8), (12, 8, 8)]
    assert (lenet["flatten"], lenet["fc"]) == ((768,), (100,))
    lenet4 = layer_shapes(build("lenet4", input_shape=(1, 28, 28)), (1, 28, 28))
    assert [lenet4[f"conv{i}"][1] for i in (1, 2, 3, 4)] == [14, 7, 7, 7]
    assert lenet4["flatten"] == (588,)
    convnet = layer_shapes(build("convnet", width=4), (3, 32, 32))
    assert [convnet[f"conv{i}"][0] for i in range(1, 9)] == [4, 8, 8, 16, 16, 16, 16, 16]
    assert (convnet["pool1"], convnet["pool2"]) == ((16, 10, 10), (16, 3, 3))
    resnet = layer_shapes(build("resnet18"), (3, 32, 32))
    assert resnet["bn1"] == (64, 32, 32)
    assert [resnet[f"layer{i}"] for i in (1, 2, 3, 4)] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
    ]
    assert resnet["flatten"] == (512,)
    resnet = layer_shapes(build("resnet18", norm="group", stem="imagenet"), (3, 32, 32))
    assert resnet["conv1"] == (64, 16, 16)
    assert [resnet[f"layer{i}"][1] for i in (1, 2, 3, 4)] == [8, 4, 2, 1]
    cnn = layer_shapes(build("cnn"), (3, 32, 32))
    assert [cnn[f"conv{i}"] for i in (1, 2, 3)] == [(16, 14, 14), (32, 5, 5), (64, 1, 1)]
    vit = layer_shapes(build("vit"), (3, 32, 32))
    assert vit["tokens"] == vit["block4"] == (65, 256)
    assert vit["first"] == (256,)


def test_the_smallest_images():
    for name in available_models():
        smallest = registry._REGISTRY[name].smallest
        model = build(name, input_shape=(3, smallest, smallest), classes=10)
        assert model(torch.rand(2, 3, smallest, smallest)).shape == (2, 10)
        if smallest > 1:
            with pytest.raises(ValueError, match=f"the smallest are {smallest}x{smallest}"):
                build(name, input_shape=(3, smallest - 1, smallest))
    with pytest.raises(ValueError, match=r"convnet.*8x32.*9x9.*\(3, 9, 9\)"):
        build("convnet", input_shape=(3, 8, 32))
    # the bound is tight: the convolutions cannot take 8 pixels
    with pytest.raises(RuntimeError, match="too small"):
        build("convnet", width=2, input_shape=(3, 9, 9))(torch.rand(1, 3, 8, 9))


def test_the_bounds_of_the_strided_networks_are_tight():
    images = torch.rand(1, 3, 28, 28)
    with pytest.raises(RuntimeError, match="Kernel size"):
        build("cnn", input_shape=(3, 29, 29))(images)


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp", "resnet18"])
def test_the_networks_of_ppps_authors_take_grey_pictures_of_another_size(name):
    digits = load_images("digits28", 2, size=32, channels=3)
    assert digits.images.shape == (2, 3, 32, 32)
    assert build(name, normalisation="mnist")(digits.images).shape == (2, 10)


def test_resnet_of_torchvision():
    """stem="imagenet" computes what torchvision's own constructor with these weights does."""
    ours = build("resnet18", norm="group", stem="imagenet", classes=7, seed=3)
    layer = partial(torch.nn.GroupNorm, 2)
    theirs = resnet18(num_classes=7, norm_layer=layer)
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 40, 32)
    torch.testing.assert_close(ours(images), theirs.eval()(images))


def test_models_come_in_eval_mode():
    assert not any(m.training for m in build("resnet18", normalisation="cifar10").modules())


@pytest.mark.parametrize("normalisation", ["cifar10", "cifar10-precode", ((0.5,), (0.25,))])
def test_normalisation_works_on_pixels(normalisation):
    plain = build("lenet", seed=2)
    normalised = build("lenet", seed=2, normalisation=normalisation)
    assert dict(plain.named_parameters()).keys() == dict(normalised.named_parameters()).keys()
    constants = normalisation if isinstance(normalisation, tuple) else NORMALISATIONS[normalisation]
    mean, std = (torch.tensor(c).expand(3)[None, :, None, None] for c in constants)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(normalised(pixels), plain((pixels - mean) / std))


def test_constants_of_the_papers():
    assert build("lenet", input_shape=(1, 28, 28), normalisation="mnist").normalise.std.item() == (
        pytest.approx(0.30810782313346863, abs=1e-7)
    )
    means = {name: constants[0][0] for name, constants in NORMALISATIONS.items()}
    assert means["mnist"] == 0.13066373765468597
    assert means["cifar10"] == 0.49140
    assert means["cifar10-precode"] == 0.4914672374725342


def test_listing():
    models = available_models()
    assert list(models) == [
        "lenet", "lenet4", "linear", "mlp", "convnet", "resnet18", "cnn", "vit",
        "cnn6", "cnn6-d", "fcn3", "lenet-rgap", "chain", "resnet-small", *copa_networks.PLANS,
    ]  # fmt: skip
    assert models["lenet"].startswith("DLG's LeNet: three 5x5 convolutions")
    assert all("\n" not in line and len(line) < 100 for line in models.values())


def test_registering_a_network(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register("two", activation="tanh", smallest=2)
    def two(input_shape, classes, activation, *, units=3):
        """Two layers."""
        first = nn.Linear(math.prod(input_shape), units)
        return nn.Sequential(nn.Flatten(), first, activation(), nn.Linear(units, classes))

    assert available_models()["two"] == "Two layers."
    model = build("two", input_shape=(1, 2, 2), units=5, normalisation=((0.5,), (0.5,)))
    assert [n for n, _ in model.named_children()] == ["normalise", "0", "1", "2", "3"]
    assert parameter_count(model) == 4 * 5 + 5 + 5 * 10 + 10
    register("binary two", activation="tanh", classes=1)(two)
    assert build("binary two").get_submodule("3").out_features == 1
    assert build("binary two", classes=4).get_submodule("3").out_features == 4
    with pytest.raises(ValueError, match="'two' is already registered"):
        register("two", activation=None)
    register("bare", activation=None)(lambda shape, classes: nn.Linear(3, classes))
    with pytest.raises(TypeError, match=r"expected nn\.Sequential, got Linear"):
        build("bare")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vgg"}, "unknown model 'vgg': choose one of lenet, lenet4"),
        ({"activation": "swish"}, "unknown activation 'swish'.*sigmoid, tanh"),
        ({"init": "zero"}, "unknown initialisation 'zero'.*kaiming, xavier, tiny"),
        ({"normalisation": "imagenet"}, "unknown normalisation 'imagenet'.*mnist"),
        ({"normalisation": "mnist", "width": 3}, "'lenet' has no option width; its options: norm"),
        ({"name": "mlp", "depth": 3, "wide": 1}, "no option depth, wide.*hidden, bias"),
        ({"name": "linear", "activation": "relu"}, "'linear' has no activation"),
        ({"name": "convnet", "norm": "layer"}, "unknown norm 'layer'.*batch, group, none"),
        ({"name": "resnet18", "norm": "none"}, "unknown norm 'none'.*batch, group"),
        ({"name": "resnet18", "stem": "none"}, "unknown stem 'none'.*cifar, imagenet"),
        ({"name": "cnn", "input_shape": (1, 28, 28)}, "28x28 pixels: the smallest are 29x29"),
        ({"name": "vit", "input_shape": (1, 30, 32)}, "patches of 4x4 tile, got 30x32; resize"),
        ({"name": "vit", "heads": 3}, "heads dividing dim, got patch=4, dim=256, .*heads=3"),
        ({"input_shape": (32, 32)}, r"expected \(channels, height, width\).*got \(32, 32\)"),
        ({"input_shape": (3, 0, 32)}, "all at least 1"),
        ({"classes": 0}, "classes: expected at least 1, got 0"),
        ({"input_shape": (1, 28, 28), "normalisation": "cifar10"}, "1 or 1 values"),
        ({"normalisation": ((0.5,), (0.0,))}, "std > 0"),
        ({"normalisation": ((0.5, 0.5, 0.5), (1.0,))}, "1 or 3 values each"),
    ],
)
def test_bad_input_says_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**{"name": "lenet", **settings})
