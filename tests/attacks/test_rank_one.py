"""One singular vector against numpy, against single rows under noise, and on what pruning left."""

import sys

import numpy as np
import pytest
import torch
from conftest import random_victims, small_lenet, small_mlp

from leaklib.attacks import (
    analytic,
    expected_overlap,
    invert_linear,
    invert_row,
    noise_limit,
    rank_one,
)
from leaklib.attacks.rank_one import complete_rank_one, leading_pair
from leaklib.defenses import (
    Compose,
    GaussianNoise,
    Prune,
    insert_bottleneck,
    partial_perturbation,
)
from leaklib.gradients import share_gradient

SHAPE = (1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def wide_mlp(**settings):
    return insert_bottleneck(
        small_mlp(hidden=(100,), **settings), image_shape=SHAPE, width=5, kl_weight=1e-3
    )


def released(defense, *, victims=6, model=None):
    model, victims = model or wide_mlp(), random_victims(victims=victims)
    shared = share_gradient(model, victims, generator=seeded(1))
    ppp = partial_perturbation(model, defense, image_shape=SHAPE)
    return model, victims, ppp(shared, generator=seeded(2))


def error(found, victims):
    """Root mean square per victim."""
    return (found.images - victims.images).square().mean((1, 2, 3, 4)).sqrt()


def test_leading_pair_equals_numpy():
    matrix = torch.randn(3, 6, 11, generator=seeded(), dtype=torch.float64)
    left, right = leading_pair(matrix)
    for i in range(3):
        u, s, v = np.linalg.svd(matrix[i].numpy())
        np.testing.assert_allclose(
            torch.outer(left[i], right[i]), s[0] * np.outer(u[:, 0], v[0]), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("normalisation", [None, "mnist"])
@pytest.mark.parametrize("complete", [False, True])
def test_without_perturbation_it_is_exact_and_finds_the_label(normalisation, complete):
    model, victims = wide_mlp(normalisation=normalisation), random_victims(victims=3)
    shared = share_gradient(model, victims, generator=seeded(1))
    found = rank_one(model, shared, image_shape=SHAPE, complete=complete)
    torch.testing.assert_close(found.images, victims.images, rtol=1e-8, atol=1e-9)
    assert torch.equal(found.labels, victims.labels)


def test_under_noise_it_beats_the_naive_row_and_least_squares():
    model, victims, shared = released(GaussianNoise(1.0, relative_to="rms"))
    settings = {"image_shape": SHAPE, "labels": victims.labels}
    singular = error(rank_one(model, shared, **settings), victims)
    row = error(analytic(model, shared, rows="largest", **settings), victims)
    every = error(analytic(model, shared, **settings), victims)
    assert bool((singular < 0.5 * row).all()), (singular, row)
    assert bool((singular < 0.7 * every).all()), (singular, every)


def test_completion_is_exact_where_enough_entries_survive():
    left = torch.randn(3, 30, generator=seeded(), dtype=torch.float64)
    right = torch.randn(3, 40, generator=seeded(1), dtype=torch.float64)
    known = torch.rand(3, 30, 40, generator=seeded(2)) < 0.3
    matrix = left[:, :, None] * right[:, None, :]
    l_found, r_found = complete_rank_one(matrix * known, known, sweeps=200)
    torch.testing.assert_close(
        l_found[:, :, None] * r_found[:, None, :], matrix, rtol=1e-6, atol=1e-9
    )
    l_plain, r_plain = leading_pair(matrix * known)
    assert (l_plain[:, :, None] * r_plain[:, None, :] - matrix).norm() > 0.5 * matrix.norm()


def test_completion_without_an_entry_gives_zero_there():
    matrix = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])).double()
    matrix[:, 1] = 0
    left, right = complete_rank_one(matrix, matrix != 0, sweeps=3)
    assert float(right[1]) == 0
    torch.testing.assert_close(torch.outer(left, right), matrix)


def test_under_pruning_completion_equals_the_largest_row_and_beats_the_plain_vector():
    model, victims, shared = released(Prune(0.7, scope="tensor"))
    settings = {"image_shape": SHAPE, "labels": victims.labels}
    completed = rank_one(model, shared, complete=True, sweeps=100, **settings)
    row = analytic(model, shared, rows="largest", **settings)
    torch.testing.assert_close(completed.images, row.images, rtol=1e-4, atol=1e-5)
    plain = rank_one(model, shared, **settings)
    assert bool((error(completed, victims) < error(plain, victims)).all())


def test_under_noise_and_pruning_completion_beats_both():
    defense = Compose([GaussianNoise(0.1, relative_to="rms"), Prune(0.7, scope="tensor")])
    model, victims, shared = released(defense)
    settings = {"image_shape": SHAPE, "labels": victims.labels}
    completed = error(rank_one(model, shared, complete=True, **settings), victims)
    assert bool((completed < error(rank_one(model, shared, **settings), victims)).all())
    row = error(analytic(model, shared, rows="largest", **settings), victims)
    assert bool((completed < row).all()), (completed, row)


def test_victims_do_not_influence_one_another(monkeypatch):
    model, victims, shared = released(GaussianNoise(0.1, relative_to="rms"), victims=3)
    settings = {"image_shape": SHAPE, "labels": victims.labels}
    together = rank_one(model, shared, **settings).images
    # the package's name `rank_one` is the function, which hides the module
    monkeypatch.setattr(sys.modules["leaklib.attacks.rank_one"], "_AT_ONCE", 1)
    looped = rank_one(model, shared, **settings).images
    torch.testing.assert_close(looped, together, rtol=1e-9, atol=1e-11)


def test_the_largest_row():
    weight = torch.randn(2, 5, 7, generator=seeded(), dtype=torch.float64)
    bias = torch.tensor([[0.1, -3.0, 2.0, 0.0, 1.0], [1.0, 0.5, 0.0, 0.0, -0.9]]).double()
    found = invert_row(weight, bias)
    torch.testing.assert_close(found[0], weight[0, 1] / -3)
    torch.testing.assert_close(found[1], weight[1, 0])
    exact = bias[:, :, None] * weight[:, :1]
    torch.testing.assert_close(invert_row(exact, bias), invert_linear(exact, bias))


class TestLimit:
    """Against simulation: a matrix of rank one in Gaussian noise."""

    def overlap(self, outputs, inputs, ratio, *, tries=8):
        """Mean measured and expected cos² at noise of 1/ratio times the limit."""
        k = torch.randn(tries, outputs, generator=seeded(), dtype=torch.float64)
        x = torch.randn(tries, inputs, generator=seeded(1), dtype=torch.float64)
        weight = k[:, :, None] * x[:, None, :]
        std = float(noise_limit(weight, k).mean()) / ratio
        noise = std * torch.randn(
            tries, outputs, inputs + 1, generator=seeded(2), dtype=torch.float64
        )
        right = torch.linalg.svd(torch.cat([weight, k[:, :, None]], 2) + noise).Vh[:, 0]
        truth = torch.cat([x, torch.ones(tries, 1, dtype=torch.float64)], 1)
        cosine = torch.cosine_similarity(right, truth, dim=1)
        return float(cosine.square().mean()), float(expected_overlap(weight, k, std=std).mean())

    @pytest.mark.parametrize("shape", [(60, 200), (200, 100)])
    @pytest.mark.parametrize("ratio", [2.0, 3.0, 6.0])
    def test_overlap_below_the_limit(self, shape, ratio):
        measured, expected = self.overlap(*shape, ratio)
        assert measured == pytest.approx(expected, abs=0.03)

    @pytest.mark.parametrize("shape", [(60, 200), (200, 100)])
    def test_beyond_the_limit_nothing_is_left(self, shape):
        measured, expected = self.overlap(*shape, 0.5)
        assert expected == 0
        assert measured < 0.05

    def test_bad_noise_is_refused(self):
        for std in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="std >= 0"):
                expected_overlap(torch.ones(2, 2), torch.ones(2), std=std)


class TestBadInput:
    def test_batch_layer_and_settings(self):
        model = wide_mlp()
        shared = share_gradient(model, random_victims(batch=2), generator=seeded())
        with pytest.raises(ValueError, match="batch 1.*mixture"):
            rank_one(model, shared, image_shape=SHAPE)
        lenet = small_lenet()
        with pytest.raises(ValueError, match="matching attack"):
            rank_one(lenet, share_gradient(lenet, random_victims()), image_shape=SHAPE)
        shared = share_gradient(model, random_victims(), generator=seeded())
        with pytest.raises(ValueError, match="sweeps >= 1"):
            rank_one(model, shared, image_shape=SHAPE, sweeps=0)
        with pytest.raises(ValueError, match="'all' or 'largest'"):
            analytic(model, shared, image_shape=SHAPE, rows="first")
        with pytest.raises(ValueError, match="'hidden9.weight'"):
            rank_one(model, shared, image_shape=SHAPE, layer="hidden9")

    @pytest.mark.parametrize("complete", [False, True])
    def test_lost_scale_and_nan(self, complete):
        model, victims = wide_mlp(), random_victims()
        shared = share_gradient(model, victims, generator=seeded())
        lost = {n: t.clone() for n, t in shared.items()}
        lost["hidden1.bias"][2] = 0
        with pytest.raises(ValueError, match="victim 2.*brightness"):
            rank_one(model, shared.replace(lost), image_shape=SHAPE, complete=complete)
        lost["hidden1.weight"][1, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="'hidden1.weight' of victim 1"):
            rank_one(model, shared.replace(lost), image_shape=SHAPE, complete=complete)
