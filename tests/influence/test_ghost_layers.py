"""Contractions of convolutions of every setting against their weight gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from influence.cases import DTYPE
from influence.gram_checks import check_model, random_input
from torch import nn

from leaklib.influence.ghost_layers import FORMS, costs, features, held_entries, matrix_layer

pytestmark = pytest.mark.filterwarnings("ignore::leaklib.influence.checks.RankWarning")


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), (6, 5)),
        (nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1)), (6, 5)),
        (nn.Conv2d(2, 4, 3, padding="same", groups=2, bias=False), (4, 5)),
        (nn.Conv2d(2, 3, 2, padding="same", dilation=3), (4, 5)),
        (nn.Conv2d(2, 3, 2, padding="valid", bias=False), (4, 5)),
        (nn.Conv2d(2, 4, 3, stride=3, padding=1, groups=2), (7, 7)),
        (nn.Conv2d(2, 5, 1), (3, 4)),
        (nn.Conv2d(2, 5, 1, stride=2, bias=False), (5, 4)),
        (nn.Conv2d(2, 2, 1, padding=1), (3, 3)),
        (nn.Conv1d(2, 4, 3, stride=2, padding=2, groups=2), (7,)),
        (nn.Conv3d(2, 2, (1, 2, 2), padding=(0, 1, 0)), (2, 3, 2)),
    ],
    ids=str,
)
def test_convolutions_of_every_setting(layer, size, batch):
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).to(DTYPE)
    x = random_input(1, batch, 2, *size)
    model(x[0])
    assert set(check_model(model, x, 3).matrix) == {"0", "3"}


@pytest.mark.parametrize("form", FORMS)
@given(
    kernel=st.integers(1, 3), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    padding=st.integers(0, 3), groups=st.sampled_from([1, 2]), batch=st.integers(1, 2),
    bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_features_of_a_convolution_are_inner_products_of_its_weight_gradient(
    form, kernel, stride, dilation, padding, groups, batch, bias
):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Conv2d(
            2, 4, kernel, stride=stride, dilation=dilation, padding=padding, groups=groups
        ).to(DTYPE)
        a, a_dot = torch.randn(batch, 2, 6, 5).to(DTYPE), torch.randn(3, batch, 2, 6, 5).to(DTYPE)
        z = layer(a)
        k, k_dot = torch.randn(z.shape).to(DTYPE), torch.randn(3, *z.shape).to(DTYPE)

    def gradient(inputs, outputs):
        weight, shift = torch.autograd.grad(layer(inputs), list(layer.parameters()), outputs)
        return torch.cat([weight.flatten(), shift if bias else shift[:0]])

    # the weight gradient is bilinear in the input and the output gradient
    rows = torch.stack([gradient(a, kd) + gradient(ad, k) for ad, kd in zip(a_dot, k_dot)])  # noqa: B905
    if bias:  # of the two terms only the first one is the bias'
        rows[:, -4:] = k_dot.sum((1, 3, 4))
    described = matrix_layer(layer, a.shape, z.shape, weight=True, bias=bias)
    held, streamed = features(replace(described, form=form), a, k, a_dot, k_dot)
    gram = sum(h @ s.T for h, s in zip(held, streamed, strict=True))
    torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-11, atol=1e-11)


def test_held_entries_count_what_is_held():
    layer = nn.Conv2d(4, 6, 3, stride=2, groups=2)
    a = torch.randn(2, 4, 7, 7)
    k = torch.randn(2, 6, 3, 3)
    for form in FORMS:
        one = replace(matrix_layer(layer, a.shape, k.shape, weight=True, bias=True), form=form)
        held, _ = features(one, a, k, a[None], k[None])
        assert held_entries(one) == sum(h.shape[1] for h in held)


def test_few_positions_and_wide_layers_stay_in_activation_space():
    def form(layer, size, k):
        one = matrix_layer(layer, *size, weight=True, bias=False)
        cost = costs(one, k)
        return min(cost, key=cost.get)

    shape = torch.Size
    wide = nn.Conv2d(64, 64, 3, padding=1)
    assert form(wide, (shape((1, 64, 4, 4)),) * 2, 64) == "kernel"
    assert form(nn.Linear(500, 10), (shape((1, 500)), shape((1, 10))), 64) == "kernel"
    narrow = nn.Conv2d(4, 4, 3, padding=1)
    assert form(narrow, (shape((1, 4, 32, 32)),) * 2, 64) == "weights"
    # between: the pairs of many directions pay for mapping ġ back
    middle = nn.Conv2d(64, 64, 3, padding=1)
    assert form(middle, (shape((1, 64, 14, 14)),) * 2, 100_000) == "adjoint"
