"""Counting codes apart from the search."""

import pytest
import torch

from revq_kernels import count_codes_, quantize


@pytest.mark.parametrize(("shape", "k"), [((50, 3), 7), ((2, 5, 4), 3), ((4,), 9), ((0, 2), 5), ((1000, 1), 2)])
def test_counts_are_exact_and_added(shape, k, impl):
    indices = torch.randint(0, k, shape)
    groups = shape[-1]
    count = torch.full((groups, k), 5)
    assert count_codes_(count, indices, impl=impl) is count
    rows = indices.reshape(-1, groups)
    for g in range(groups):
        assert torch.equal(count[g], 5 + torch.bincount(rows[:, g], minlength=k))


def test_non_contiguous_arguments(impl):
    indices, count = torch.randint(0, 6, (3, 40)).T, torch.zeros(3, 6, dtype=torch.int64)
    count_codes_(count, indices, impl=impl)
    assert count.sum() == 120
    assert torch.equal(count[1], torch.bincount(indices[:, 1], minlength=6))
    with pytest.raises(ValueError, match=r"count: expected contiguous memory of its own, got strides \(1, 3\)"):
        count_codes_(torch.zeros(6, 3, dtype=torch.int64).T, indices, impl=impl)


def test_indices_in_the_memory_of_count(impl):
    """Never writes outside count: the choices are read before any is counted, or the call is refused."""
    memory = torch.full((64,), 2)
    count = memory[:3].view(1, 3)
    count_codes_(count, count.view(3, 1), impl=impl)
    assert memory[:3].tolist() == [2, 2, 5]
    assert memory[3:].tolist() == [2] * 61


def test_version_counter_sees_the_change(impl):
    count, x, codebook = torch.zeros(2, 7, dtype=torch.int64), torch.randn(5, 2, 4), torch.randn(2, 7, 4)
    before = count._version
    quantize(x, codebook, count=count, impl=impl)
    after = count._version
    assert after > before
    count_codes_(count, torch.zeros(5, 2, dtype=torch.int64), impl=impl)
    assert count._version > after
