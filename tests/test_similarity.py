"""Image metrics against scikit-image, numpy and closed forms."""

import doctest
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

import leaklib.metrics.similarity
from leaklib.metrics.similarity import lpips, mse, psnr_db, ssim


def images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_doctests():
    assert doctest.testmod(leaklib.metrics.similarity).failed == 0


def test_error_and_psnr_equal_numpy_and_skimage():
    x, y = images(2, 5, 3, 9, 7, seed=1), images(2, 5, 3, 9, 7, seed=2)
    error, psnr = mse(x, y), psnr_db(x, y)
    assert error.shape == psnr.shape == (2, 5)
    for index in np.ndindex(2, 5):
        a, b = y[index].numpy(), x[index].numpy()
        assert float(error[index]) == pytest.approx(np.mean((a - b) ** 2), rel=1e-12)
        assert float(psnr[index]) == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=1), rel=1e-12
        )


def test_exact_reconstruction_has_infinite_psnr():
    x = images(3, 1, 8, 8)
    assert psnr_db(x, x).tolist() == [float("inf")] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_are_float64_whatever_the_pixels(dtype):
    x, y = images(3, 8, 8, seed=1).to(dtype), images(3, 8, 8, seed=2).to(dtype)
    for metric in (mse, psnr_db, ssim):
        value = metric(x, y)
        assert value.dtype == torch.float64
        assert float(value) == float(metric(x.double(), y.double()))


SKIMAGE = {
    "default": ({}, {}),
    "window 5": ({"window": 5}, {"win_size": 5}),
    "gaussian": (
        {"gaussian": True},
        {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
    ),
}


@pytest.mark.parametrize("case", SKIMAGE)
@settings(deadline=None, derandomize=True)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(11, 20),
    width=st.integers(11, 20),
    noise=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_ssim_equals_skimage(case, channels, height, width, noise, seed):
    ours, theirs = SKIMAGE[case]
    y = images(2, channels, height, width, seed=seed)
    x = y + noise * (images(2, channels, height, width, seed=seed + 1) - 0.5)
    value = ssim(x, y, **ours)
    for one in range(2):
        expected = structural_similarity(
            x[one].numpy(), y[one].numpy(), channel_axis=0, data_range=1, **theirs
        )
        assert abs(float(value[one]) - expected) < 1e-10


def test_ssim_of_the_smallest_images():
    x, y = images(1, 7, 8, seed=1), images(1, 7, 8, seed=2)
    expected = structural_similarity(x.numpy(), y.numpy(), channel_axis=0, data_range=1)
    assert float(ssim(x, y)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 6, 8), {}, "at least 7 x 7 pixels, got 6 x 8"),
        ((1, 8, 8), {"gaussian": True}, "at least 11 x 11.*gaussian=False"),
        ((1, 8, 8), {"window": 4}, "odd window"),
        ((1, 8, 8), {"window": 1}, "odd window"),
    ],
)
def test_ssim_refuses_a_window_that_does_not_fit(shape, options, message):
    with pytest.raises(ValueError, match=message):
        ssim(images(*shape), images(*shape), **options)


@pytest.mark.parametrize("metric", [mse, psnr_db, ssim])
def test_divergence_stays_with_its_image(metric):
    x, y = images(4, 1, 8, 8, seed=1), images(4, 1, 8, 8, seed=2)
    x[2, 0, 3, 3] = float("nan")
    value = metric(x, y)
    assert value.isnan().tolist() == [False, False, True, False]
    assert torch.equal(value[[0, 1, 3]], metric(x[[0, 1, 3]], y[[0, 1, 3]]))


@pytest.mark.parametrize("metric", [mse, psnr_db, ssim])
def test_bad_input_is_refused(metric):
    good = images(1, 8, 8)
    for bad in (good - 2, good + 2, good / 0, good * torch.nan):
        with pytest.raises(ValueError, match="originals in \\[0, 1\\]"):
            metric(good, bad)
    with pytest.raises(ValueError, match=r"one shape .* got \(2, 1, 8, 8\) and \(1, 8, 8\)"):
        metric(images(2, 1, 8, 8), good)
    with pytest.raises(ValueError, match="one shape"):
        metric(good[0], good[0])
    with pytest.raises(ValueError, match="divide by 255"):
        metric((good * 255).byte(), good)
    with pytest.raises(ValueError, match="one device, got meta and cpu"):
        metric(good.to("meta"), good)


def test_metrics_detach():
    x = images(1, 8, 8).requires_grad_()
    assert not mse(x, images(1, 8, 8)).requires_grad


class FakeLPIPS(nn.Module):
    """Stands in for the package: mean absolute difference after its own scaling."""

    def __init__(self, net, verbose):
        super().__init__()
        assert not verbose
        self.net = net

    def forward(self, x, y, normalize=False):
        assert normalize
        assert not self.training
        assert x.shape[1] == 3
        return (2 * x - 2 * y).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_hands_over_unit_pixels_in_blocks(monkeypatch, channels):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=FakeLPIPS))
    x, y = images(2, 40, channels, 32, 32, seed=1), images(2, 40, channels, 32, 32, seed=2)
    value = lpips(x, y)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, 2 * (x - y).abs().mean(dim=(2, 3, 4)), rtol=1e-5, atol=0)


def test_lpips_says_what_is_missing(monkeypatch):
    x = images(3, 32, 32)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install"):
        lpips(x, x)

    def no_network(**_):
        raise OSError("name resolution failed")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=no_network))
    with pytest.raises(RuntimeError, match="ImageNet weights of 'alex', got name resolution"):
        lpips(x, x)
    for shape in ((3, 31, 40), (2, 32, 32)):
        with pytest.raises(ValueError, match="1 or 3 channels and at least 32"):
            lpips(images(*shape), images(*shape))
