"""Matching from activations, against the generic problem: networks of all known layers."""

from dataclasses import replace

import pytest
import torch
from attacks.ghost_checks import SHAPE, assert_same, both, point, rng
from conftest import random_victims, small_lenet
from torch import nn

import leaklib.attacks.ghost_layers
import leaklib.attacks.ghost_matching
from leaklib.attacks import Matching
from leaklib.attacks.ghost_layers import find_layers
from leaklib.defenses import GaussianNoise, Prune, insert_bottleneck
from leaklib.gradients import share_gradient
from leaklib.models import build


class CutOff(nn.Module):
    """One of two layers meets a constant: the image, but without its derivative."""

    def __init__(self):
        super().__init__()
        self.cut, self.free, self.fc = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.fc(torch.tanh(self.cut(x.detach())) * torch.tanh(self.free(x)))


class Residual(nn.Module):
    """In place as torchvision's blocks are: the sum overwrites what the norm gave."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm, self.act = norm, nn.Softplus()

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return self.act(out)


def frozen_batchnorm():
    norm = nn.BatchNorm2d(6)
    norm.running_mean.copy_(torch.linspace(-1, 1, 6))
    norm.running_var.copy_(torch.linspace(0.5, 2, 6))
    return norm


def convolutional(norm):
    return nn.Sequential(
        nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), nn.Tanh(),
        Residual(6, norm), nn.AvgPool2d(2), nn.Conv2d(6, 9, 1, padding="valid"), nn.GELU(),
        nn.Conv2d(9, 40, 3, padding="same", dilation=2), nn.Softplus(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.LayerNorm(40), nn.ReLU(inplace=True), nn.Linear(40, 10),
    )  # fmt: skip


def small_vit():
    options = {"patch": 4, "dim": 16, "layers": 1, "heads": 2, "hidden": 12}
    return build("vit", input_shape=SHAPE, classes=10, **options)


def convolutional_bottleneck():
    model = convolutional(nn.GroupNorm(2, 6))
    return insert_bottleneck(model, before="8", kind="cvb", image_shape=SHAPE, width=4)


NETWORKS = {
    "lenet": small_lenet,
    "group norm": lambda: convolutional(nn.GroupNorm(3, 6)),
    "frozen batch norm": lambda: convolutional(frozen_batchnorm()).eval(),
    "vit": small_vit,
    "rows of a picture": lambda: nn.Sequential(
        nn.Linear(8, 3), nn.Softplus(), nn.Flatten(), nn.Linear(24, 10)
    ),
    "in place": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Linear(8, 10)
    ),
    "convolutional bottleneck": convolutional_bottleneck,
    "norms without scale or shift": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.LayerNorm((6, 6), bias=False),
        nn.Tanh(), nn.Flatten(), nn.Linear(144, 8), nn.GroupNorm(2, 8), nn.GELU(),
        nn.LayerNorm(8, elementwise_affine=False), nn.Dropout(0.0), nn.Linear(8, 10),
    ),
    "cut off": CutOff,
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("distance", ["l2", "cosine", "layer_cosine"])
@pytest.mark.parametrize("batch", [1, 2])
def test_networks_with_positions(network, distance, batch):
    torch.manual_seed(0)
    model = NETWORKS[network]().double()
    victims = random_victims(batch=batch)
    shared = share_gradient(model, victims, generator=rng())
    if batch == 2:  # dense targets
        shared = GaussianNoise(1e-2)(shared, generator=rng())
    ghost, generic = both(
        model, shared, labels=victims.labels, matching=Matching(distance, tv_weight=0.1),
        restarts=2, noise_seed=3,
    )  # fmt: skip
    for rows in ([0, 1, 2, 3, 4, 5], [5, 0, 2]):
        rows = torch.tensor(rows)
        assert_same(ghost, generic, point(ghost, 6)[rows], rows)


def test_resnet18():
    model = build("resnet18", input_shape=SHAPE, classes=10, norm="group", activation="gelu")
    model, victims = model.double(), random_victims()
    ghost, generic = both(
        model, share_gradient(model, victims), labels=victims.labels, matching=Matching("cosine")
    )
    assert_same(ghost, generic, point(ghost, 3)[:2], torch.arange(2))


@pytest.mark.parametrize("factored", [True, False])
def test_both_forms_of_every_layer(monkeypatch, factored):
    """Each layer contracted, and each gradient formed, whatever is cheaper."""
    describe = leaklib.attacks.ghost_layers._describe
    monkeypatch.setattr(
        leaklib.attacks.ghost_layers, "_describe",
        lambda module, *args: replace(
            describe(module, *args), factored=factored and isinstance(module, nn.Conv2d | nn.Linear)
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    model, victims = convolutional(nn.GroupNorm(2, 6)).double(), random_victims(batch=2)
    shared = share_gradient(model, victims)
    for released in (shared, Prune(0.5, scope="tensor")(shared, generator=rng())):
        for distance in ("l2", "cosine"):
            ghost, generic = both(
                model, released, labels=victims.labels, matching=Matching(distance)
            )
            assert_same(ghost, generic, point(ghost, 3), torch.arange(3))


def test_the_cheaper_form_is_chosen():
    model = build("resnet18", norm="group", stem="imagenet")
    names = tuple(name for name, _ in model.named_parameters())
    layers, _ = find_layers(model, names, image_shape=(3, 32, 32), batch=1)
    # 64 filters on 256 positions, and 512 filters on one
    assert (layers["conv1"].factored, layers["conv1"].positions) == (False, 256)
    last = layers["layer4.1.conv2"]
    assert (last.factored, last.positions) == (True, 1)


def test_rows_in_blocks_give_the_same(monkeypatch):
    torch.manual_seed(0)
    model, victims = convolutional(nn.GroupNorm(2, 6)).double(), random_victims()
    model = insert_bottleneck(model, before="12", image_shape=SHAPE, width=4)
    shared = share_gradient(model, victims, generator=rng())
    settings = {"labels": victims.labels, "matching": Matching("cosine"), "noise_seed": 2}
    whole = both(model, shared, restarts=2, **settings)[0]
    monkeypatch.setattr(leaklib.attacks.ghost_matching, "_ENTRIES", 5000)
    blocks = both(model, shared, restarts=2, **settings)[0]
    x, rows = point(whole, 6), torch.arange(6)
    for one, other in zip(whole.evaluate(x, rows, 4), blocks.evaluate(x, rows, 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_layers_that_are_not_compared_take_memory_too():
    model = small_lenet()
    names = tuple(name for name, _ in model.named_parameters())
    carried = [
        find_layers(model, some, image_shape=SHAPE, batch=1)[1] for some in (names, names[-1:])
    ]
    assert carried[0] == carried[1] > 64 + 10
