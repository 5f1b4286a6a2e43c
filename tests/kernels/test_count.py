"""Counting codes apart from the search."""

import pytest
import torch

from revq_kernels import count_codes_, quantize
from revq_kernels.testing.problems import contract_index


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
    """No write outside count: all indices are read before any is counted, or the call is refused."""
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


def test_counts_of_many_rows_in_one_group_for_any_thread_count():
    """Enough rows for every thread to count a part; also indices that are mostly one code."""
    indices = torch.randint(0, 7, (400_000, 1))
    indices[::2] = 3
    expected = torch.bincount(indices[:, 0], minlength=9)[None] + 5
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(count_codes_(torch.full((1, 9), 5), indices, impl="native"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "groups", "num_codes", "d"),
    [(600, 1, 20000, 8), (5, 203, 30, 3), (20, 203, 600, 4), (600, 37, 30, 3), (3, 5, 10, 2)],
    ids=["split-codes", "neighbors", "neighbors-first-pass", "blocks", "fewer-groups-than-threads"],
)
def test_a_search_split_over_threads_counts_every_query_once(rows, groups, num_codes, d):
    """Work split over threads by codes, by single groups, by several neighboring groups, and by blocks of queries."""
    x, codebook = torch.randn(rows, groups, d), torch.randn(groups, num_codes, d)
    expected, place = contract_index(x, codebook), torch.arange(groups)
    chosen = torch.zeros(groups, num_codes, dtype=torch.int64).index_put_(
        (place, expected), torch.tensor(1), accumulate=True
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 8):
            torch.set_num_threads(threads)
            count = torch.zeros(groups, num_codes, dtype=torch.int64)
            quantized, indices = quantize(x, codebook, count=count, impl="native")
            assert torch.equal(indices, expected)
            assert torch.equal(count, chosen)
            assert torch.equal(quantized, codebook[place, indices])
    finally:
        torch.set_num_threads(before)
