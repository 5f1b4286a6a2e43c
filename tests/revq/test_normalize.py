"""Statistics against numpy in float64 (two passes over all data), and the normalizer."""

import numpy as np
import pytest
import torch

from revq.errors import InputError
from revq.model.normalizer import LatentStatistics, Normalizer

SHAPE = (3, 2, 4)


def data(rows=1000, offset=0.0):
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(SHAPE, generator=generator) * 5 + 0.1
    return torch.randn(rows, *SHAPE, generator=generator).double() * scale + offset


def collect(parts):
    statistics = LatentStatistics()
    for part in parts:
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e9])
@pytest.mark.parametrize("sizes", [[1000], [1] * 1000, [999, 1], [1, 7, 300, 92, 600]], ids=str)
def test_statistics_are_exact_for_any_split(offset, sizes):
    latents = data(offset=offset)
    statistics = collect(latents.split(sizes))
    # numpy's variance of the shifted data, which loses no digits to cancellation
    shifted = latents.numpy() - offset
    assert statistics.count == 1000
    np.testing.assert_allclose(statistics.mean.numpy(), latents.numpy().mean(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(statistics.variance.numpy(), shifted.var(0), rtol=max(1e-12, abs(offset) * 1e-15))


def test_float32_batches_with_a_large_mean_keep_their_variance():
    latents = data(offset=1e6).float()
    truth = latents.double().numpy()
    statistics = collect(latents.split(64))
    np.testing.assert_allclose(statistics.variance.numpy(), truth.var(0), rtol=1e-9)
    naive = latents.square().mean(0) - latents.mean(0).square()
    assert (naive - statistics.variance).abs().max() > 1, "the naive formula must fail here"


def test_merge_equals_one_pass_in_either_order():
    latents = data(offset=1e3)
    whole = collect([latents])
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = LatentStatistics()
        parts = latents.split([10, 600, 390])
        for index in order:
            merged.merge(collect(parts[index].split(33)))
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean.numpy(), whole.mean.numpy(), rtol=1e-14)
        np.testing.assert_allclose(merged.variance.numpy(), whole.variance.numpy(), rtol=1e-12)


def test_merging_does_not_change_the_other():
    left, right = collect([data(5)]), collect([data(9, offset=2.0)])
    mean = right.mean.clone()
    left.merge(right)
    left.merge(LatentStatistics())
    assert (left.count, right.count) == (14, 9)
    assert torch.equal(right.mean, mean)


def test_state_continues_bit_for_bit():
    latents = data()
    first = collect([latents[:300]])
    restored = LatentStatistics()
    restored.load_state_dict(first.state_dict())
    for statistics in (first, restored):
        statistics.update(latents[300:])
    assert torch.equal(first.mean, restored.mean)
    assert torch.equal(first.variance, restored.variance)


def test_population_variance_of_one_sample_is_zero():
    statistics = collect([data(1), data(0)])
    assert statistics.count == 1
    assert torch.equal(statistics.variance, torch.zeros(SHAPE, dtype=torch.float64))


def test_other_shapes_are_refused():
    statistics = collect([data(4)])
    with pytest.raises(InputError, match=r"expected shape \(3, 2, 4\).*got \(3, 2, 5\)"):
        statistics.update(torch.zeros(4, 3, 2, 5))
    with pytest.raises(InputError, match="statistics: expected shape"):
        Normalizer((3, 2, 5)).fit_(statistics)


def test_normalizer_starts_as_the_identity():
    normalizer, latents = Normalizer(SHAPE), data(4).float()
    assert torch.equal(normalizer.normalize(latents), latents)
    assert torch.equal(normalizer.denormalize(latents), latents)


def test_normalizer_standardizes_each_element_and_inverts():
    latents = (data(offset=5.0) * torch.linspace(0.1, 10, 24).view(SHAPE)).float()
    normalizer = Normalizer(SHAPE).fit_(collect(latents.split(100)))
    normalized = normalizer.normalize(latents)
    assert normalizer.mean.shape == normalizer.std.shape == SHAPE
    torch.testing.assert_close(normalized.mean(0), torch.zeros(SHAPE), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.var(0, correction=0), torch.ones(SHAPE), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalizer.denormalize(normalized), latents, atol=1e-4, rtol=1e-6)


def test_normalizing_rounds_each_operation_once():
    latents = data(50).float()
    normalizer = Normalizer(SHAPE).fit_(collect([latents]))
    mean, std = normalizer.mean.numpy(), normalizer.std.numpy()
    assert np.array_equal(normalizer.normalize(latents).numpy(), (latents.numpy() - mean) / std)
    assert normalizer.normalize(latents.half()).dtype == torch.float32


def test_an_element_that_never_varies_gets_std_one():
    latents = data(64).float()
    latents[:, 1, 0, 2] = 0.1
    normalizer = Normalizer(SHAPE).fit_(collect(latents.split(7)))
    assert normalizer.std[1, 0, 2] == 1
    assert torch.equal(normalizer.normalize(latents)[:, 1, 0, 2], torch.zeros(64))


def test_unusable_statistics_are_refused():
    with pytest.raises(InputError, match="at least one latent"):
        Normalizer(SHAPE).fit_(LatentStatistics())
    latents = data(8)
    latents[3, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="finite"):
        Normalizer(SHAPE).fit_(collect([latents]))
