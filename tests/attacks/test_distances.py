import pytest
import torch

from leaklib.attacks.distances import DISTANCES
from leaklib.attacks.priors import statistics_distance, total_variation

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 1, 2, 2)}


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def definition(name, grads, target, weights):
    """Each distance as its formula reads, for autograd to differentiate."""
    if name == "l2":
        return sum(weights[n] * ((grads[n] - target[n]) ** 2).sum() for n in grads)
    if name == "layer_cosine":
        return sum(
            weights[n]
            * (1 - torch.cosine_similarity(grads[n].flatten(), target[n].flatten(), dim=0))
            for n in grads
        )
    scaled = {n: weights[n] ** 0.5 for n in grads}
    one = torch.cat([scaled[n] * grads[n].flatten() for n in grads])
    two = torch.cat([scaled[n] * target[n].flatten() for n in grads])
    return 1 - torch.cosine_similarity(one, two, dim=0)


@pytest.mark.parametrize("name", list(DISTANCES))
def test_value_and_cotangent_equal_autograd(name):
    grads, target = drawn(0), drawn(1)
    weights = {"a": 1.0, "b": 2.5, "c": 0.0}
    leaves = {n: g.clone().requires_grad_() for n, g in grads.items()}
    expected = definition(name, leaves, target, weights)
    slopes = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    value, cotangent = DISTANCES[name](grads, target, weights)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
    for n, slope in zip(leaves, slopes, strict=True):
        slope = torch.zeros_like(grads[n]) if slope is None else slope
        torch.testing.assert_close(cotangent[n], slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", list(DISTANCES))
def test_a_match_has_distance_zero(name):
    grads = drawn(0)
    value, cotangent = DISTANCES[name](grads, grads, dict.fromkeys(grads, 1.0))
    assert abs(float(value)) < 1e-14
    assert all(float(c.abs().max()) < 1e-14 for c in cotangent.values())


@pytest.mark.parametrize("name", ["cosine", "layer_cosine"])
def test_zero_gradient_gives_finite_numbers(name):
    zero = {n: torch.zeros_like(g) for n, g in drawn(0).items()}
    value, cotangent = DISTANCES[name](zero, drawn(1), dict.fromkeys(zero, 1.0))
    assert torch.isfinite(value)
    assert all(torch.isfinite(c).all() for c in cotangent.values())


def test_total_variation_by_hand():
    image = torch.tensor([[[0.0, 1.0, 1.0], [0.5, 0.5, 0.0]]], dtype=torch.float64)
    down = (0.5 + 0.5 + 1.0) / 3
    right = (1.0 + 0.0 + 0.0 + 0.5) / 4
    assert float(total_variation(image)) == pytest.approx(down + right, rel=1e-14)
    assert float(total_variation(torch.ones(1, 1, 1, 1))) == 0.0


def test_statistics_distance_by_hand():
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    measured, known = {"bn": (3 * one, one)}, {"bn": (zero, zero)}
    expected = (9 + 9) ** 0.5 + 2**0.5
    assert float(statistics_distance(measured, known)) == pytest.approx(expected, rel=1e-12)
