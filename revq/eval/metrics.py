"""Image quality against a reference, in plain torch: PSNR and SSIM of RGB images in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from revq.errors import InputError

WINDOW = 11
SIGMA = 1.5


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all channels, data range 1.

    The evaluation in the paper's released code measures the red channel only, so its results differ.

    Args:
        a, b: float ``[B, C, H, W]`` in [0, 1].

    Returns:
        float32 ``[B]``; infinity for equal images.

    Raises:
        InputError: for other shapes or dtypes, or values that are NaN or outside [0, 1].
    """
    _check(a, b)
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return (-10 * torch.log10(error)).float()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004), mean over pixels and channels, data range 1.

    A Gaussian window of 11x11 with sigma 1.5 around every pixel; K1 = 0.01, K2 = 0.03, population variances.  Images
    are mirrored at the border without repeating the edge pixel.  These are the defaults of torchmetrics 1.9.
    Implementations that omit the pixels near the border differ in the third decimal.

    Args:
        a, b: float ``[B, C, H, W]`` in [0, 1], H and W at least 11.

    Returns:
        float32 ``[B]``.

    Raises:
        InputError: for other shapes or dtypes, or values that are NaN or outside [0, 1].
    """
    _check(a, b)
    if min(a.shape[2:]) < WINDOW:
        raise InputError(f"images: expected at least {WINDOW}x{WINDOW} pixels for SSIM, got {tuple(a.shape[2:])}")
    a, b = a.double(), b.double()
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = (_blur(a * a) - mean_a**2).clamp(min=0)
    variance_b = (_blur(b * b) - mean_b**2).clamp(min=0)
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3)).float()


def _blur(images: Tensor) -> Tensor:
    """The Gaussian mean around every pixel; the border is mirrored.  ``[B, C, H, W]`` -> the same shape."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    planes = F.pad(images.flatten(0, 1).unsqueeze(1), [WINDOW // 2] * 4, mode="reflect")
    # The window is separable: one convolution along columns, one along rows.
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return planes.view(*images.shape[:2], *planes.shape[2:])


def _check(a: Tensor, b: Tensor) -> None:
    if a.dim() != 4 or a.shape != b.shape:
        raise InputError(f"images: expected two equal shapes [B, C, H, W], got {tuple(a.shape)} and {tuple(b.shape)}")
    for images in (a, b):
        if not images.is_floating_point():
            raise InputError(f"images: expected floating point numbers in [0, 1], got {images.dtype}")
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise InputError(
                f"images: expected numbers in [0, 1], got {float(images.min()):.4g} to {float(images.max()):.4g}"
            )
