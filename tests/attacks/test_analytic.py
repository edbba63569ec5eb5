import pytest
import torch
from conftest import random_victims, small_lenet, small_mlp

from leaklib.attacks import analytic, invert_linear
from leaklib.gradients import FedAvg, share_gradient

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("normalisation", [None, "mnist"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("protocol", [None, FedAvg(5, 0.5)])
def test_the_image_itself_comes_back(normalisation, reduction, protocol):
    model, victims = small_mlp(normalisation=normalisation), random_victims(victims=5)
    shared = share_gradient(model, victims, reduction=reduction, protocol=protocol)
    found = analytic(model, shared, image_shape=SHAPE, labels=victims.labels)
    torch.testing.assert_close(found.images, victims.images, rtol=1e-10, atol=1e-12)
    assert found.evaluations.tolist() == [0] * 5


def test_labels_come_with_it():
    model, victims = small_mlp(), random_victims(victims=20)
    found = analytic(model, share_gradient(model, victims), image_shape=SHAPE)
    assert torch.equal(found.labels, victims.labels)


def test_float32_is_exact_to_rounding():
    model, victims = small_mlp().float(), random_victims(dtype=torch.float32)
    found = analytic(model, share_gradient(model, victims), image_shape=SHAPE)
    assert float((found.images - victims.images).abs().max()) < 1e-5


def test_least_squares_beats_a_single_row_under_noise():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(32, generator=generator, dtype=torch.float64)
    x = torch.rand(50, generator=generator, dtype=torch.float64)
    noise = 1e-3 * torch.randn(32, 50, generator=generator, dtype=torch.float64)
    noisy = torch.outer(g, x) + noise
    rows = noisy / g[:, None]
    error = (invert_linear(noisy, g) - x).norm()
    assert error < (rows - x).norm(dim=1).min()
    reference = torch.linalg.lstsq(g[:, None], noisy).solution[0]
    torch.testing.assert_close(invert_linear(noisy, g), reference)


class TestBadInput:
    def test_a_batch_is_a_mixture(self):
        model = small_mlp()
        shared = share_gradient(model, random_victims(batch=2))
        with pytest.raises(ValueError, match="batch 1.*mixture"):
            analytic(model, shared, image_shape=SHAPE)

    def test_a_convolutional_first_layer(self):
        model = small_lenet()
        shared = share_gradient(model, random_victims())
        with pytest.raises(ValueError, match="matching attack"):
            analytic(model, shared, image_shape=SHAPE)

    def test_no_bias(self):
        model = small_mlp(bias=False)
        shared = share_gradient(model, random_victims())
        with pytest.raises(ValueError, match="bias"):
            analytic(model, shared, image_shape=SHAPE)

    def test_dead_layer_names_the_victim(self):
        model, victims = small_mlp(), random_victims()
        shared = share_gradient(model, victims)
        dead = {n: t.clone() for n, t in shared.items()}
        first = next(n for n in dead if n.endswith("bias"))
        dead[first][1] = 0
        with pytest.raises(ValueError, match="victim 1"):
            analytic(model, shared.replace(dead), image_shape=SHAPE)

    def test_a_layer_that_is_not_the_first(self):
        model = small_mlp()
        shared = share_gradient(model, random_victims())
        last = shared.names[-1].rsplit(".", 1)[0]
        with pytest.raises(ValueError, match="64 inputs"):
            analytic(model, shared, image_shape=SHAPE, layer=last)
