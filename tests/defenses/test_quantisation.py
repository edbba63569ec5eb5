"""Signs and levels against numpy; unbiasedness of random rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaklib.defenses import Quantize, Sign
from leaklib.gradients.payload import SharedGradient


def gradient(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return SharedGradient(
        {"w": scale * torch.randn(*shape, generator=generator, dtype=torch.float64)}, batch=1
    )


def levels(bits, peak):
    if bits == 1:
        return np.array([-peak, peak])
    return np.linspace(-peak, peak, 2**bits - 1)


def test_sign():
    shared = SharedGradient({"w": torch.tensor([[-3.0, 0.0, 1e-30], [2.0, -2.0, 5.0]])}, batch=1)
    assert Sign()(shared).tensors["w"].tolist() == [[-1, 0, 1], [1, -1, 1]]


def test_scaled_sign_keeps_the_mean_magnitude_of_each_tensor_and_victim():
    shared = gradient(3, 4, 5)
    released = Sign(scaled=True)(shared).tensors["w"].numpy()
    for v in range(3):
        g = shared.tensors["w"][v].numpy()
        np.testing.assert_allclose(released[v], np.sign(g) * np.abs(g).mean(), rtol=1e-12)


@settings(deadline=None, derandomize=True)
@given(bits=st.integers(1, 8), seed=st.integers(0, 2**20), scale=st.sampled_from([1e-8, 1.0, 1e8]))
def test_nearest_level_of_each_victim(bits, seed, scale):
    shared = gradient(2, 3, 4, seed=seed, scale=scale)
    released = Quantize(bits)(shared).tensors["w"].numpy()
    for v in range(2):
        g = shared.tensors["w"][v].numpy()
        grid = levels(bits, np.abs(g).max())
        nearest = grid[np.abs(g[..., None] - grid).argmin(axis=-1)]
        np.testing.assert_allclose(released[v], nearest, rtol=1e-12, atol=1e-14 * scale)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_zero_stays_zero(bits):
    grad = torch.tensor([[0.0, 1.0, -0.3]])
    shared = SharedGradient({"w": grad}, batch=1)
    generator = torch.Generator().manual_seed(0)
    assert Quantize(bits)(shared).tensors["w"][0, 0] == 0
    for _ in range(50):
        released = Quantize(bits, stochastic=True)(shared, generator=generator)
        assert released.tensors["w"][0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_random_rounding_is_unbiased_and_takes_a_neighbouring_level(bits):
    g = np.array([-1.0, -0.8, -0.5, -0.123, 0.0, 0.01, 0.31, 0.77])
    draws = 20_000
    repeated = torch.tensor(g)[None].expand(draws, -1)  # each draw is a victim
    generator = torch.Generator().manual_seed(1)
    released = Quantize(bits, stochastic=True)(
        SharedGradient({"w": repeated}, batch=1), generator=generator
    ).tensors["w"]
    grid = levels(bits, 1.0)
    step = grid[1] - grid[0]
    offsets = (released.numpy() - grid[0]) / step
    np.testing.assert_allclose(offsets, offsets.round(), atol=1e-9)
    assert np.abs(released.numpy() - g).max() < step * (1 + 1e-9)
    # Between two levels at distance `step` the variance is p(1 − p)·step².
    p = np.mod((g - grid[0]) / step, 1)
    deviation = np.sqrt(p * (1 - p) / draws) * step
    assert (np.abs(released.mean(dim=0).numpy() - g) <= 4.5 * deviation + 1e-12).all()
    variance = released.numpy().var(axis=0)
    np.testing.assert_allclose(variance, p * (1 - p) * step**2, atol=0.02 * step**2)


def test_16_bits_are_close_and_more_bits_closer():
    shared = gradient(1, 1000)
    errors = [
        float((Quantize(bits)(shared).tensors["w"] - shared.tensors["w"]).abs().max())
        for bits in (2, 4, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < float(shared.tensors["w"].abs().max()) / 2**15


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_bad_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits from 1 to 16, got {bits}"):
        Quantize(bits)


@pytest.mark.parametrize("bits", [8.0, "8", True])
def test_bits_that_are_no_integer_are_refused(bits):
    with pytest.raises(ValueError, match="bits to be an integer"):
        Quantize(bits)
