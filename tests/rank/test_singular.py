"""Singular values give counted ranks whatever the scales, and the true ones of special cases."""

import numpy as np
import pytest
import torch
from rank.dense_rows import dense_rows, exact_rank
from rank.networks import cnn6, lenet
from torch import nn

from leaklib.chain import PoolStage
from leaklib.layer_system import Geometry
from leaklib.rank import generic_rank, singular_rank, singular_weight_rank
from leaklib.rank import singular as module


def drawn(geometry, *, victims=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(geometry.weight_shape, generator=generator, dtype=torch.float64)
    shape = (victims, *geometry.output_shape)
    return weight, torch.randn(shape, generator=generator, dtype=torch.float64)


LAYERS = {
    "short of equations": Geometry((6, 9, 9), 8, (3, 3), (2, 2), (1, 1)),
    "full by both": Geometry((3, 8, 8), 12, (4, 4), (2, 2), (2, 2)),
    "full by the gradient": Geometry((4, 5, 5), 16, (3, 3), padding=(1, 1)),
    "grouped": Geometry((6, 9, 7), 4, (3, 2), (2, 1), (1, 0), groups=2),
    "dilated": Geometry((2, 11, 11), 1, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "pixels that no output sees": Geometry((4, 7, 7), 6, (1, 1), (2, 2)),
    "as many filters as outputs": Geometry((3, 5, 5), 9, (3, 3), (2, 2), (1, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_generic_layers_have_the_counted_rank(name):
    geometry = LAYERS[name]
    weight, grad = drawn(geometry, victims=3)
    found, count = singular_rank(geometry, weight, grad), generic_rank(geometry)
    assert found.rank.tolist() == [count.rank] * 3
    assert found.gradient_rank.tolist() == [count.gradient_rank] * 3
    assert found.deficit.tolist() == [count.deficit] * 3
    assert bool((found.smallest_kept > 1e-5).all())
    assert bool((found.largest_dropped < 1e-13).all())
    assert singular_weight_rank(geometry, weight) == count.weight_rank


def test_cnn6_d_is_short_of_280_and_unambiguously_so():
    geometry = cnn6(20)[1]
    weight, grad = drawn(geometry)
    found = singular_rank(geometry, weight, grad)
    assert found.deficit.item() == -280
    assert found.smallest_kept.item() > 1e-3
    assert found.largest_dropped.item() < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("layers", [cnn6(), cnn6(20), lenet((8, 12, 12)), lenet((12, 8, 12))])
def test_the_networks_of_the_paper_layer_by_layer(layers):
    for geometry in layers:
        found = singular_rank(geometry, *drawn(geometry))
        assert found.rank.item() == generic_rank(geometry).rank


@pytest.mark.parametrize("scale", [1e-9, 1e-30, 1e9])
@pytest.mark.parametrize("name", LAYERS)
def test_scales_of_gradient_and_weight_do_not_matter(name, scale):
    geometry = LAYERS[name]
    weight, grad = drawn(geometry)
    plain = singular_rank(geometry, weight, grad)
    for found in (
        singular_rank(geometry, weight, scale * grad),
        singular_rank(geometry, scale * weight, grad),
    ):
        assert found.rank.tolist() == plain.rank.tolist()
        torch.testing.assert_close(found.smallest_kept, plain.smallest_kept, rtol=1e-6, atol=0)


def test_the_condition_is_that_of_the_worse_of_the_two_steps():
    geometry = LAYERS["full by the gradient"]
    weight, grad = drawn(geometry)
    found = singular_rank(geometry, weight, grad)
    _, k = dense_rows(geometry, weight.numpy(), grad[0].numpy())
    assert found.condition.item() == pytest.approx(np.linalg.cond(k), rel=1e-9)


def test_a_float32_gradient_without_victims_is_taken_as_one_victim_in_float64():
    geometry = LAYERS["short of equations"]
    weight, grad = drawn(geometry)
    found = singular_rank(geometry, weight.float(), grad[0].float())
    assert found.rank.tolist() == [generic_rank(geometry).rank]
    assert bool((found.largest_dropped < 1e-13).all())


def integers(geometry, seed=0):
    """Small integers, whose dense rows have an exact rank."""
    rng = np.random.default_rng(seed)
    return rng.integers(-9, 10, geometry.weight_shape), rng.integers(-9, 10, geometry.output_shape)


def special(name):
    geometry = Geometry((2, 6, 6), 4, (3, 3), (2, 2), (1, 1))
    weight, grad = integers(geometry)
    if name == "two filters alike in both":
        weight[1], grad[1] = 2 * weight[0], 3 * grad[0]
    elif name == "dead units":
        grad[:, 1:] = 0
    elif name == "no gradient":
        grad[:] = 0
    elif name == "no weight":
        weight[:] = 0
    elif name == "neither":
        weight[:], grad[:] = 0, 0
    return geometry, weight, grad


@pytest.mark.parametrize(
    "name",
    ["two filters alike in both", "dead units", "no gradient", "no weight", "neither", "generic"],
)
def test_layers_that_are_not_generic(name):
    geometry, weight, grad = special(name)
    w, k = dense_rows(geometry, weight, grad)
    found = singular_rank(geometry, torch.tensor(weight), torch.tensor(grad))
    assert found.gradient_rank.item() == exact_rank(k)
    assert found.rank.item() == exact_rank(np.concatenate([w, k]))
    assert singular_weight_rank(geometry, torch.tensor(weight)) == exact_rank(w)
    expected = generic_rank(geometry).rank
    assert (found.rank.item() == expected) == (name == "generic")


def test_hidden_and_pooled_preactivations_give_fewer_equations():
    geometry = Geometry((4, 6, 6), 2, (3, 3), padding=(1, 1))
    weight, grad = integers(geometry)
    known = np.random.default_rng(1).integers(0, 2, geometry.output_shape)
    w, k = dense_rows(geometry, weight, grad * known)
    expected = exact_rank(np.concatenate([w * known.reshape(-1, 1), k]))
    found = singular_rank(
        geometry, torch.tensor(weight), torch.tensor(grad * known), known=torch.tensor(known)
    )
    assert found.rank.item() == expected < generic_rank(geometry).rank

    pool = PoolStage("pool", nn.AvgPool2d(2), geometry.output_shape, (2, 3, 3))
    pooled = np.random.default_rng(2).integers(-9, 10, (2, 3, 3))
    spread = np.repeat(np.repeat(pooled, 2, 1), 2, 2)  # the transpose of pooling, times 4
    w, k = dense_rows(geometry, weight, spread)
    means = w.reshape(2, 3, 2, 3, 2, -1).sum((2, 4)).reshape(18, -1)
    expected = exact_rank(np.concatenate([means, k]))
    found = singular_rank(geometry, torch.tensor(weight), torch.tensor(spread), pool=pool)
    assert found.rank.item() == expected < generic_rank(geometry).rank


def layer(**changes):
    geometry = LAYERS["short of equations"]
    weight, grad = drawn(geometry)
    return {"geometry": geometry, "weight": weight, "preactivation_grad": grad} | changes


BAD = {
    "weight of another layer": (
        layer(weight=torch.ones(8, 6, 3, 2)), r"weight: expected shape \(8, 6, 3, 3\).*got \(8"),
    "gradient of another size": (
        layer(preactivation_grad=torch.ones(1, 8, 9, 9)), r"\(victims, 8, 5, 5\), got \(1, 8, 9"),
    "no victims": (layer(preactivation_grad=torch.ones(0, 8, 5, 5)), "got .0, 8, 5, 5."),
    "NaN": (layer(weight=torch.full((8, 6, 3, 3), torch.nan)), "finite.*check the training"),
    "inf": (layer(preactivation_grad=torch.full((8, 5, 5), torch.inf)), "finite.*check the loss"),
    "tolerance": (layer(tolerance=1.0), "between 0 and 1, got 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_way_out(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        singular_rank(**arguments)


def test_large_matrices_are_refused_before_they_are_built(monkeypatch):
    geometry = Geometry((3, 224, 224), 64, (7, 7), (2, 2), (3, 3))
    weight = torch.zeros(geometry.weight_shape)
    with pytest.raises(ValueError, match=r"50176 x 50176; count instead \(generic_rank\)"):
        singular_rank(geometry, weight, torch.zeros(geometry.output_shape))
    with pytest.raises(ValueError, match="802816 x 150528; count instead"):
        singular_weight_rank(geometry, weight)
    monkeypatch.setattr(module, "LARGEST", 10_000)  # enough for the block, not for the rest
    with pytest.raises(ValueError, match="200 x 150"):
        singular_rank(**layer())
