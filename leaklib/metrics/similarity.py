"""How close two images are: squared error, PSNR, structural similarity, LPIPS.

Every function takes pixels in [0, 1] shaped (..., channels, height, width), reduces the last three
axes and keeps the others: one number per image. Numbers are computed and returned in float64 on the
device of the images. A reconstruction that diverged (NaN) scores NaN and leaves its neighbours
alone; an original outside [0, 1] is an error, because then the scale is not known.
"""

import warnings
from typing import Literal

import torch
from torch import Tensor

__all__ = ["as_pair", "lpips", "mse", "psnr_db", "ssim"]

_PIXEL_AXES = (-3, -2, -1)


def mse(images: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error over channels and pixels.

    Args:
        images: Reconstructions, (..., channels, height, width).
        originals: Private images of the same shape, in [0, 1].

    Returns:
        (...) float64, in [0, 1] for images in [0, 1].

    Raises:
        ValueError: Shapes differ, pixels are not floating point, originals are outside [0, 1].

    >>> float(mse(torch.full((3, 8, 8), 0.5), torch.zeros(3, 8, 8)))
    0.25
    """
    images, originals = as_pair(images, originals)
    return (images - originals).square().mean(dim=_PIXEL_AXES)


def psnr_db(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 20 log10(1/RMSE), for a peak of 1.

    Args:
        images: Reconstructions, (..., channels, height, width).
        originals: Private images of the same shape, in [0, 1].

    Returns:
        (...) float64 in decibel; inf for an exact reconstruction.

    Raises:
        ValueError: As :func:`mse`.

    An error of one tenth everywhere is 20 dB:

    >>> zeros = torch.zeros(1, 8, 8, dtype=torch.float64)
    >>> round(float(psnr_db(zeros + 0.1, zeros)), 9)
    20.0
    """
    return -10 * torch.log10(mse(images, originals))


def ssim(
    images: Tensor, originals: Tensor, *, gaussian: bool = False, window: int | None = None
) -> Tensor:
    """Structural similarity, averaged over all windows inside the image and over channels.

    With the means μ, variances σ² and covariance σ_xy of one window, C₁ = 0.01², C₂ = 0.03²,

        SSIM = (2 μ_x μ_y + C₁)(2 σ_xy + C₂) / ((μ_x² + μ_y² + C₁)(σ_x² + σ_y² + C₂)).

    Equal to ``skimage.metrics.structural_similarity(..., channel_axis=-3, data_range=1)``: by
    default its uniform 7 x 7 window with sample covariance; with ``gaussian`` the weights of the
    original paper (``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``, 11 x 11).

    Args:
        images: Reconstructions, (..., channels, height, width).
        originals: Private images of the same shape, in [0, 1].
        gaussian: Weigh the window by a Gaussian of standard deviation 1.5 pixels.
        window: Odd side of the window in pixels; 7, or 11 with ``gaussian``.

    Returns:
        (...) float64, at most 1; 1 for equal images.

    Raises:
        ValueError: As :func:`mse`; also a window that is even or larger than the image.

    Source: Z. Wang et al., IEEE Transactions on Image Processing 13 (2004) 600-612.

    Flat images leave only the means, (2ab + C₁)/(a² + b² + C₁):

    >>> zeros = torch.zeros(1, 8, 8)
    >>> float(ssim(zeros + 0.5, zeros + 0.5))
    1.0
    >>> round(float(ssim(zeros + 1, zeros)) * (1 + 1e-4) / 1e-4, 9)
    1.0
    """
    images, originals = as_pair(images, originals)
    side = window if window is not None else (11 if gaussian else 7)
    if side < 3 or side % 2 == 0:
        raise ValueError(f"expected an odd window of at least 3 pixels, got {side}; try 7")
    height, width = images.shape[-2:]
    if min(height, width) < side:
        raise ValueError(
            f"expected images of at least {side} x {side} pixels, got {height} x {width}; "
            f"pass a smaller odd window{' or gaussian=False' if gaussian else ''}"
        )
    offsets = torch.arange(side, dtype=torch.float64, device=images.device) - side // 2
    weights = torch.exp(-0.5 * (offsets / 1.5).square()) if gaussian else torch.ones_like(offsets)
    weights = weights / weights.sum()
    unbias = 1.0 if gaussian else side**2 / (side**2 - 1)

    mean_x, mean_y = _windowed(images, weights), _windowed(originals, weights)
    var_x = unbias * (_windowed(images.square(), weights) - mean_x.square())
    var_y = unbias * (_windowed(originals.square(), weights) - mean_y.square())
    cov = unbias * (_windowed(images * originals, weights) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    denominator = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (numerator / denominator).mean(dim=_PIXEL_AXES)


def lpips(images: Tensor, originals: Tensor, *, net: Literal["alex", "vgg"] = "alex") -> Tensor:
    """Learned perceptual distance; lower is closer.

    Needs the package ``lpips`` and the weights of its network, which torchvision fetches on first
    use. Where either is missing this raises; it never stands in with NaN.

    Args:
        images: Reconstructions, (..., channels, height, width), one or three channels.
        originals: Private images of the same shape, in [0, 1].
        net: Network whose features are compared.

    Returns:
        (...) float64; 0 for equal images.

    Raises:
        ImportError: The package is not installed.
        RuntimeError: The weights are neither on disk nor to be had.
        ValueError: As :func:`mse`; also images under 32 pixels or an unsuitable channel count.

    Source: R. Zhang et al., CVPR 2018, arXiv:1801.03924.
    """
    try:
        import lpips as package
    except ImportError as error:
        raise ImportError(
            "expected the package lpips, which is not installed; run pip install 'leaklib[lpips]'"
        ) from error
    images, originals = as_pair(images, originals)
    channels, height, width = images.shape[-3:]
    if channels not in (1, 3) or min(height, width) < 32:
        raise ValueError(
            f"expected 1 or 3 channels and at least 32 x 32 pixels, got {channels} channels and "
            f"{height} x {width} pixels; upsample the images or use ssim"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision in a way that is now deprecated
            network = package.LPIPS(net=net, verbose=False).to(images.device).eval()
    except OSError as error:  # no network, or no permission to write the weights
        raise RuntimeError(
            f"expected the ImageNet weights of {net!r}, got {error}; fetch them once with network "
            "through torchvision, or place them in torch's hub folder"
        ) from error
    flat_x = images.float().reshape(-1, channels, height, width).expand(-1, 3, -1, -1)
    flat_y = originals.float().reshape(-1, channels, height, width).expand(-1, 3, -1, -1)
    with torch.no_grad():
        blocks = zip(flat_x.split(64), flat_y.split(64), strict=True)
        # normalize=True: the network was trained on [-1, 1], our pixels are in [0, 1].
        distance = [network(x, y, normalize=True).flatten() for x, y in blocks]
    return torch.cat(distance).double().reshape(images.shape[:-3])


def as_pair(images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """Check a pair of image tensors and widen both to float64."""
    if images.shape != originals.shape or originals.ndim < 3:
        raise ValueError(
            "expected two tensors of one shape (..., channels, height, width), "
            f"got {tuple(images.shape)} and {tuple(originals.shape)}; reshape one of them"
        )
    if images.device != originals.device:
        raise ValueError(
            f"expected one device, got {images.device} and {originals.device}; move one with .to"
        )
    for pixels in (images, originals):
        if not pixels.is_floating_point():
            raise ValueError(
                f"expected floating-point pixels in [0, 1], got {pixels.dtype}; divide by 255"
            )
    if not bool(((originals >= 0) & (originals <= 1)).all()):  # NaN fails both
        raise ValueError(
            "expected originals in [0, 1], got a pixel outside or NaN; undo the normalisation "
            "and pass the reconstruction first, the original second"
        )
    return images.detach().double(), originals.detach().double()


def _windowed(images: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over every window that fits inside the image, one axis after the other."""
    side = weights.numel()
    height, width = images.shape[-2:]
    tall = sum(
        weight * images[..., i : height - side + 1 + i, :] for i, weight in enumerate(weights)
    )
    return sum(weight * tall[..., i : width - side + 1 + i] for i, weight in enumerate(weights))
