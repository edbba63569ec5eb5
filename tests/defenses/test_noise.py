"""Noise: distribution, level and independence, with fixed seeds."""

import numpy as np
import pytest
import scipy.stats
import torch

from leaklib.defenses import GaussianNoise, LaplaceNoise
from leaklib.gradients.payload import SharedGradient

N = 40_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(defense, *, base=0.0, victims=1, seed=0):
    shared = SharedGradient({"w": torch.full((victims, N), base, dtype=torch.float64)}, batch=1)
    return (defense(shared, generator=seeded(seed)).tensors["w"] - base).numpy()


@pytest.mark.parametrize(
    ("defense", "distribution", "variance"),
    [
        (GaussianNoise(0.3), scipy.stats.norm(scale=0.3), 0.3**2),
        (LaplaceNoise(0.3), scipy.stats.laplace(scale=0.3), 2 * 0.3**2),
    ],
)
def test_distribution(defense, distribution, variance):
    noise = draws(defense)[0]
    assert scipy.stats.kstest(noise, distribution.cdf).pvalue > 0.01
    assert np.var(noise) == pytest.approx(variance, rel=0.03)
    assert abs(np.mean(noise)) < 4 * np.sqrt(variance / N)


def test_gaussian_variance_by_chi_square():
    total = np.square(draws(GaussianNoise(2.0))[0] / 2.0).sum()
    assert 0.005 < scipy.stats.chi2.cdf(total, df=N) < 0.995


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise])
def test_noise_is_independent_of_the_gradient_over_victims_and_tensors(kind):
    noise = draws(kind(1.0), base=5.0, victims=2)
    np.testing.assert_allclose(noise, draws(kind(1.0), victims=2), atol=1e-12)
    zeros = torch.zeros(2, N, dtype=torch.float64)
    shared = SharedGradient({"a": zeros, "b": zeros}, batch=1)
    released = kind(1.0)(shared, generator=seeded())
    streams = torch.cat([released.tensors["a"], released.tensors["b"]])
    correlation = torch.corrcoef(streams) - torch.eye(4)
    assert correlation.abs().max() < 4 / N**0.5


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise])
def test_relative_level_is_the_victims_rms_over_all_tensors(kind):
    generator = seeded(3)
    sizes = torch.tensor([[1.0], [1e3], [0.0]], dtype=torch.float64)
    a = sizes * torch.randn(3, 30, generator=generator, dtype=torch.float64)
    b = 10 * sizes * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    shared = SharedGradient({"a": a, "b": b.reshape(3, 2, 3)}, batch=1)
    unit = kind(1.0)(shared.replace({n: 0 * t for n, t in shared.items()}), generator=seeded())
    released = kind(0.2, relative_to="rms")(shared, generator=seeded())
    rms = np.sqrt(np.mean(np.concatenate([a.numpy(), b.numpy()], axis=1) ** 2, axis=1))
    for name in shared.names:
        expected = shared.tensors[name].numpy().reshape(3, -1) + 0.2 * rms[:, None] * unit.tensors[
            name
        ].numpy().reshape(3, -1)
        np.testing.assert_allclose(
            released.tensors[name].numpy().reshape(3, -1), expected, rtol=1e-12, atol=1e-12
        )


def test_tiny_half_precision_gradients_have_an_rms():
    shared = SharedGradient({"w": torch.full((1, N), 1e-4, dtype=torch.float16)}, batch=1)
    released = GaussianNoise(1.0, relative_to="rms")(shared, generator=seeded())
    assert float(released.tensors["w"].double().std()) == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise])
def test_no_noise_changes_nothing(kind):
    shared = SharedGradient({"w": torch.linspace(-1, 1, 9)[None]}, batch=1)
    released = kind(0.0)(shared, generator=seeded())
    assert torch.equal(released.tensors["w"], shared.tensors["w"])


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise])
@pytest.mark.parametrize("level", [-1e-3, float("nan"), float("inf")])
def test_bad_levels_are_refused(kind, level):
    with pytest.raises(ValueError, match=r"expected a finite (std|scale) >= 0, got"):
        kind(level)


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise])
def test_an_unknown_reference_is_refused(kind):
    with pytest.raises(ValueError, match="relative_to to be one of None, 'rms', got 'norm'"):
        kind(0.1, relative_to="norm")
