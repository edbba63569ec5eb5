"""The networks of the hybrid attack against what its released code builds, and its index."""

import pytest
import torch
from torch import nn

from leaklib.models import build
from leaklib.models.copa_networks import PLANS
from leaklib.rank import rank_analysis

# inputs of the linear layer and deficits from the image on, for 3x32x32
FACTS = {
    "cnn2_c0": (225, None),
    "cnn2_c1": (5400, [0]),
    "cnn2_c2": (1350, [-1470]),
    "cnn2_c4": (900, [-2146]),
    "cnn2_c5": (3072, None),
    "cnn2_c6": (2352, None),
    "cnn3_c1": (588, [0, -4533]),
    "cnn3_c2": (147, [-1470, -1050]),
    "cnn3_c3": (7056, None),
    "cnn3_c4": (4704, None),
    "cnn3_c8": (588, None),
    "cnn3_c9": (5488, None),
    "cnn4_c1": (363, [0, -3965, -386]),
    "cnn4_c2": (4608, [0, -9316, 0]),
    "cnn4_c3": (2304, None),
    "lenet2": (768, [0, 0, 0]),
}
INDICES = {
    "cnn2_c1": 0, "cnn2_c2": -1470, "cnn2_c4": -2146, "cnn3_c1": -2266, "cnn3_c2": -1995,
    "cnn4_c1": -2772, "cnn4_c2": -6211, "lenet2": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_only_the_linear_layer_has_a_bias(name):
    model = build(name)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.fc.bias is not None
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert hasattr(model, "last") == (PLANS[name].last != "identity")


@pytest.mark.parametrize("name", FACTS)
def test_sizes_and_deficits(name):
    features, deficits = FACTS[name]
    model = build(name)
    assert model.fc.in_features == features
    if deficits is not None:
        report = rank_analysis(model, (3, 32, 32))
        assert list(report.deficits) == deficits
        assert round(report.index) == pytest.approx(INDICES[name], abs=1)


def test_the_weights_are_drawn_from_image_to_output():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        conv1 = nn.Conv2d(3, 6, 4, stride=2, bias=False)
        conv2 = nn.Conv2d(6, 3, 3, stride=2, bias=False)
        fc = nn.Linear(147, 10)
    model = build("cnn3_c2", seed=10)
    for ours, theirs in ((model.conv1, conv1), (model.conv2, conv2), (model.fc, fc)):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
    torch.testing.assert_close(model.fc.bias, fc.bias, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "activation", "last"),
    [
        ("cnn2_c11", nn.LeakyReLU, nn.Sigmoid),
        ("cnn3_c32", nn.Softplus, nn.Sigmoid),
        ("cnn3_c15", nn.Identity, nn.Tanh),
    ],
)
def test_variants_change_activations_alone(name, activation, last):
    model, base = build(name), build(name[:-1])
    assert isinstance(model.act1, activation)
    assert isinstance(model.last, last)
    torch.testing.assert_close(model.conv1.weight, base.conv1.weight, rtol=0, atol=0)
