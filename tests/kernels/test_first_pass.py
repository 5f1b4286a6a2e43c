"""The CPU's first pass, clone by clone: its index, which path a query takes, and that its cost has no cliffs."""

import numpy as np
import pytest
import torch

from revq_kernels import nearest_code
from revq_kernels.testing import contract_index, problems

dev = pytest.importorskip("revq_kernels._dev", reason="the tests' window is built with REVQ_DEV=1")

CLONES = range(dev.cpu_isa() + 1)
PROBLEMS = [p for p in problems() if p.x.numel() > 0]


def search(isa: int, x: torch.Tensor, codes: torch.Tensor, centre: torch.Tensor | None = None, tiles: int = 0):
    """x ``[n, d]``, codes ``[K, d]`` -> (indices, candidate cells, queries that took D over a run of codes)."""
    centre = codes.float().mean(0).nan_to_num(0.0, 0.0, 0.0) if centre is None else centre
    index, cells, searched = dev.search(isa, x.float().numpy(), codes.float().numpy(), centre.numpy(), tiles=tiles)
    return torch.from_numpy(index), cells, searched


@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_every_clone_gives_the_contracts_index(problem):
    num_groups, _, d = problem.codebook.shape
    queries = problem.x.reshape(-1, num_groups, d)
    expected = contract_index(queries, problem.codebook)
    for isa in CLONES:
        for tiles in (0, 1):  # all codes in few runs, and in many
            for g in range(num_groups):
                index, _, _ = search(isa, queries[:, g], problem.codebook[g], tiles=tiles)
                assert torch.equal(index, expected[:, g]), (isa, tiles, g)


@pytest.mark.parametrize("isa", CLONES)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 31, 64, 129, 256, 512])
def test_every_d_and_ragged_sizes(isa, d):
    for n, k in ((1, 1), (13, 50), (29, 700), (265, 2049 if d < 64 else 97)):
        x, codes = torch.randn(n, d), torch.randn(k, d)
        expected = contract_index(x[:, None], codes[None])[:, 0]
        index, _, searched = search(isa, x, codes)
        assert torch.equal(index, expected)
        assert searched == 0 or d == 1  # on a line, many codes are nearly as near


@pytest.mark.parametrize("isa", CLONES)
@pytest.mark.parametrize("d", [4, 8, 64])
def test_plain_data_settle_in_one_cell_and_twins_in_two(isa, d):
    x, codes = torch.randn(256, d), torch.randn(4096, d)
    _, cells, searched = search(isa, x, codes)
    assert searched == 0
    plain = cells
    assert plain <= 4 * 256  # about one in every run of codes that holds a new best
    twins = codes.clone()
    twins[torch.randperm(4096)[:1638]] = codes[torch.randint(0, 4096, (1638,))]  # 40 %
    _, cells, searched = search(isa, x, twins)
    assert searched == 0
    assert cells <= plain + 256


@pytest.mark.parametrize("isa", CLONES)
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_an_offset_changes_no_path(isa, offset):
    x, codes = torch.randn(256, 8) + offset, torch.randn(4096, 8) + offset
    index, cells, searched = search(isa, x, codes)
    assert torch.equal(index, contract_index(x[:, None], codes[None])[:, 0])
    assert searched == 0
    assert cells <= 4 * 256
    _, cells_off_centre, searched = search(isa, x, codes, centre=torch.zeros(8))
    assert cells_off_centre + 256 * searched > cells or offset < 100  # the centre is what does it


@pytest.mark.parametrize("isa", CLONES)
def test_what_no_bound_can_settle_is_searched(isa):
    """The fallback, reason by reason, for these queries and no others; its index is the contract's too."""
    x, codes = torch.randn(60, 4), torch.randn(1000, 4)

    def searched(x, codes):
        index, _, count = search(isa, x, codes)
        assert torch.equal(index, contract_index(x[:, None], codes[None])[:, 0])
        return count

    assert searched(x, codes) == 0
    for value in (torch.nan, torch.inf, 3e38, 1e20):
        strange = x.clone()
        strange[::3, 1] = value
        assert searched(strange, codes) == 20
    crowd = 1.0 + 2.0**-23 * torch.randn(1000, 4)
    assert searched(x, crowd) == 60  # more near ties than a short list holds
    assert searched(x * 1e-22, codes * 1e-22) == 60  # distances that underflow are all equal
    assert searched(x * 1e18, codes * 1e18) == 60
    assert searched(x, codes * 1e30) == 60
    outlier = codes.clone()
    outlier[7] = torch.inf
    outlier[8, 2] = 1e25
    assert searched(x, outlier) == 0  # they win for none of these queries
    outlier[9, 0] = torch.nan
    assert searched(x, outlier) == 60


@pytest.mark.parametrize("isa", CLONES)
@pytest.mark.parametrize(("d", "k", "rows"), [(4, 1000, 1), (4, 5003, 40), (8, 9001, 60), (33, 3000, 9), (3, 3001, 2)])
@pytest.mark.parametrize("tiles", [0, 1])
def test_copies_are_left_out(isa, d, k, rows, tiles):
    """Many copies of each code: found, excluded but for the first, and nothing is left to D over all codes."""
    x, codes = torch.randn(300, d), torch.randn(rows, d)
    codes = codes[torch.randint(0, rows, (k,))]
    codes[k // 2 :, 0] += 0.5 * (torch.arange(k - k // 2) % 2)
    codes[codes == 0] = -0.0  # other bits, the same number
    index, _, searched = search(isa, x, codes, tiles=tiles)
    assert torch.equal(index, contract_index(x[:, None], codes[None])[:, 0])
    assert searched == 0
    zeros = torch.zeros(1000, d)
    zeros[torch.randperm(1000)[:500]] = -0.0
    index, _, _ = search(isa, x, zeros, tiles=tiles)
    assert torch.equal(index, contract_index(x[:, None], zeros[None])[:, 0])


@pytest.mark.parametrize("d", [1, 3, 4, 7, 8, 12, 19])
def test_every_half_is_converted_exactly(d):
    """All 63,488 finite float16 and the infinities, as queries against themselves among codes."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[: halves.numel() // d * d].view(-1, 1, d)
    codes = torch.randn(1, 5, d).half()
    some = halves[:: max(1, halves.shape[0] // 3000)]
    assert torch.equal(nearest_code(some, codes, impl="native"), contract_index(some, codes))
    codes = halves[torch.isfinite(halves).all(-1).squeeze(1)].transpose(0, 1)[:, :4000]
    assert torch.equal(nearest_code(some, codes, impl="native"), contract_index(some, codes))


@pytest.mark.parametrize(("n", "k", "d"), [(1, 50000, 8), (16, 40000, 8), (300, 20000, 4), (700, 3000, 33)])
def test_codes_split_over_threads_and_batches_permuted(n, k, d):
    codes = torch.randn(1, k // 2, d).repeat(1, 2, 1)  # every code has a twin, in another thread's range
    x = torch.randn(n, 1, d)
    expected = contract_index(x, codes)
    order = torch.randperm(n)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(nearest_code(x, codes, impl="native"), expected)
            assert torch.equal(nearest_code(x[order], codes, impl="native"), expected[order])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_several_runs(dtype):
    x, codes = torch.randn(70, 2, 12).to(dtype), torch.randn(2, 9000, 12).to(dtype)
    assert torch.equal(nearest_code(x, codes, impl="native"), contract_index(x, codes))
    codes = torch.randn(2, 12, 9000).transpose(1, 2)
    assert torch.equal(nearest_code(x, codes, impl="native"), contract_index(x, codes))


def test_a_clone_that_the_machine_lacks_is_refused():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="no such clone"):
        dev.search(dev.cpu_isa() + 1, x, x, x[0])
