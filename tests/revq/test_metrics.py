"""PSNR and SSIM against hand-made truths and torchmetrics."""

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from revq.errors import InputError
from revq.metrics import psnr, ssim


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


def test_ssim_of_a_single_window_is_the_formula():
    generator = torch.Generator().manual_seed(7)
    a, b = torch.rand(2, 1, 1, 11, 11, generator=generator, dtype=torch.float64)
    line = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    weight = line[:, None] * line / line.sum() ** 2
    mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
    var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
    covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
    expected = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    torch.testing.assert_close(ssim(a, b), expected.float().view(1), atol=1e-6, rtol=0)


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
    with pytest.raises(InputError, match="got torch.uint8"):
        metric(good.byte(), good.byte())


def test_ssim_needs_one_window():
    with pytest.raises(InputError, match="at least 11x11"):
        ssim(torch.rand(1, 3, 10, 40), torch.rand(1, 3, 10, 40))
