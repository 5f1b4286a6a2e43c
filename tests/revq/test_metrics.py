"""PSNR and SSIM against known values, the formula and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from revq.errors import InputError
from revq.eval.metrics import psnr, ssim


def pairs():
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(6, 3, 8, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(base, size=(40, 56), mode="bicubic").clamp(0, 1)
    noise = torch.randn(smooth.shape, generator=generator) * torch.linspace(0.001, 0.5, 6).view(-1, 1, 1, 1)
    return smooth, (smooth + noise).clamp(0, 1)


def test_psnr_of_known_errors():
    a = torch.full((3, 3, 4, 5), 0.5)
    b = a + torch.tensor([0.1, 0.01, 0.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0, float("inf")]), atol=1e-4, rtol=0)


def test_psnr_uses_all_channels_of_each_image():
    a = torch.zeros(1, 3, 4, 4)
    b = a.clone()
    b[:, 2] = 0.3  # mean squared error 0.03
    torch.testing.assert_close(psnr(a, b), torch.tensor([15.228787]), atol=1e-4, rtol=0)


def test_ssim_equals_torchmetrics():
    a, b = pairs()
    expected = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
    assert expected.max() - expected.min() > 0.3
    torch.testing.assert_close(ssim(a, b), expected, atol=1e-4, rtol=0)


def test_ssim_is_the_formula_in_the_window_around_each_pixel():
    generator = torch.Generator().manual_seed(7)
    a, b = torch.rand(2, 1, 1, 12, 14, generator=generator, dtype=torch.float64)
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weight = line[:, None] * line / line.sum() ** 2
    wide_a, wide_b = (np.pad(image[0, 0].numpy(), 5, mode="reflect") for image in (a, b))
    values = []
    for row, column in np.ndindex(12, 14):
        x, y = (wide[row : row + 11, column : column + 11] for wide in (wide_a, wide_b))
        mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
        var_x, var_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
        covariance = (weight * (x - mean_x) * (y - mean_y)).sum()
        value = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
        values.append(value / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)))
    assert float(ssim(a, b)) == pytest.approx(np.mean(values), abs=1e-6)


def test_equal_images_score_one_and_worse_images_less():
    a, b = pairs()
    assert torch.equal(ssim(a, a), torch.ones(6))
    assert (ssim(a, b).diff() < 0).all(), "noise grows from image to image"
    assert (psnr(a, b).diff() < 0).all()
    torch.testing.assert_close(ssim(a, b), ssim(b, a))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_unusable_images_are_refused(metric):
    good = torch.rand(1, 3, 16, 16)
    with pytest.raises(InputError, match=r"two equal shapes .* \(1, 3, 16, 16\) and \(1, 3, 16, 15\)"):
        metric(good, good[..., :15])
    with pytest.raises(InputError, match=r"in \[0, 1\], got -1 to"):
        metric(good * 0 - 1, good)
    with pytest.raises(InputError, match=r"in \[0, 1\], got nan to nan"):
        metric(good, good * float("nan"))
    with pytest.raises(InputError, match=r"got torch\.uint8"):
        metric(good.byte(), good.byte())


def test_ssim_needs_one_window():
    with pytest.raises(InputError, match="at least 11x11"):
        ssim(torch.rand(1, 3, 10, 40), torch.rand(1, 3, 10, 40))
