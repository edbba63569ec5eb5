"""The hybrid where the layer before has too few virtual constraints, or too few equations."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from leaklib.attacks import rgap
from leaklib.attacks.recursive.deficit import left_null_space
from leaklib.chain import read_chain
from leaklib.data import Victims
from leaklib.gradients import share_gradient
from leaklib.margin_losses import LOGISTIC
from leaklib.rank import generic_rank

SHAPE = (2, 8, 8)


def _network(first, kernel, second, last):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(2, first, kernel, padding=1, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(first, second, last, bias=False), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.LazyLinear(1, bias=False),
        ).double()  # fmt: skip
        model(torch.zeros(1, *SHAPE, dtype=torch.float64))
    return model.eval()


def _attack(model, **settings):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, *SHAPE, generator=generator, dtype=torch.float64)
    labels = (model(images[:, 0]) < 0).long()
    shared = share_gradient(model, Victims(images, labels), loss=LOGISTIC)
    found = rgap(model, shared, image_shape=SHAPE, labels=labels, deficient="hybrid", **settings)
    return found, (found.images - images).flatten(1).square().mean(1)


def test_the_gradient_of_the_layer_before_is_matched():
    """68 virtual constraints for 78 missing equations: W alone does not suffice, W and K do."""
    model = _network(4, 4, 2, 3)
    first, _, second, *_ = read_chain(model, SHAPE)
    before, short = generic_rank(first.geometry), generic_rank(second.geometry)
    assert before.weight_constraints < -short.deficit < before.joint_constraints
    found, error = _attack(model)
    solved = found.layers[1].steps > 0
    # a search may end in a wrong set of kinks; then it says so and keeps the minimum norm
    assert int(solved.sum()) >= 1
    assert float(error[solved].max()) < 1e-18
    assert float(found.layers[0].residual[solved].max()) < 1e-9
    assert all(
        name == "2" for name, ok in zip(found.first_wrong_layer(), solved, strict=True) if not ok
    )


def test_too_few_equations_of_any_kind_leave_the_minimum_norm():
    model = _network(3, 3, 1, 3)
    first, _, second, *_ = read_chain(model, SHAPE)
    missing = -generic_rank(second.geometry).deficit
    assert missing > generic_rank(first.geometry).joint_constraints
    found, error = _attack(model)
    assert found.layers[1].steps.tolist() == [0, 0]
    assert float(error.min()) > 1e-4
    assert found.first_wrong_layer() == ["2", "2"]


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("rank", [2, 4])
def test_the_left_null_space(shape, rank):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape)
    matrix = left @ right.T
    found = left_null_space(matrix)
    want = scipy.linalg.null_space(matrix.numpy().T)
    assert found.shape == (shape[0] - rank, shape[0])
    np.testing.assert_allclose(found.T.numpy() @ found.numpy(), want @ want.T, atol=1e-9)
