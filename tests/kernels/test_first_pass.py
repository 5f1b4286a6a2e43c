"""The first pass on a CPU, clone by clone: the index, which path a query takes, and that no data make it far slower."""

import numpy as np
import pytest
import torch

from revq_kernels import nearest_code
from revq_kernels.testing.problems import contract_index, problems

dev = pytest.importorskip("revq_kernels._dev", reason="the tests' window is built with REVQ_DEV=1")

ISAS = range(dev.cpu_isa() + 1)
CLONES = [
    *((isa, False) for isa in ISAS if isa < 3),  # 3 differs from 2 in the int16 pass alone
    *((isa, True) for isa in ISAS if dev.has_int16(isa)),
]
"""Instruction set, and whether the first pass rounds to int16."""
PROBLEMS = [p for p in problems() if p.x.numel() > 0]


def counted_search(
    clone: tuple[int, bool], x: torch.Tensor, codes: torch.Tensor, center: torch.Tensor | None = None, tiles: int = 0
):
    """x ``[n, d]``, codes ``[K, d]`` -> (indices, candidate cells, and queries times runs of codes that took brute
    force, and that int16 settled)."""
    center = codes.float().mean(0).nan_to_num(0.0, 0.0, 0.0) if center is None else center
    isa, int16 = clone
    arrays = (x.float().numpy(), codes.float().numpy(), center.numpy())
    index, *counters = dev.search(isa, *arrays, tiles=tiles, int16=int16)
    return torch.from_numpy(index), *counters


def search(*arguments, **named):
    """The first three of `counted_search`."""
    return counted_search(*arguments, **named)[:3]


@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_every_clone_gives_the_contracts_index(problem):
    num_groups, _, d = problem.codebook.shape
    queries = problem.x.reshape(-1, num_groups, d)
    expected = contract_index(queries, problem.codebook)
    for clone in CLONES:
        for tiles in (0, 1):  # all codes in few runs, and in many
            for g in range(num_groups):
                index, _, _ = search(clone, queries[:, g], problem.codebook[g], tiles=tiles)
                assert torch.equal(index, expected[:, g]), (clone, tiles, g)


@pytest.mark.parametrize("clone", CLONES, ids=str)
@pytest.mark.parametrize("d", [1, 4, 5, 8, 64, 200])
def test_every_code_finds_itself_in_cells_of_every_size_and_in_a_last_one_that_is_not_full(clone, d):
    """Cells have 2, 4, 8 or more codes, by d and K; the smaller ones share a register."""
    for k in (35, 257, 262, 1025, 1030, 4099):
        codes = torch.randn(k, d)
        codes[-1] = codes[-2]  # a duplicate, in the same cell or the one before: the lower index wins
        index, _, searched = search(clone, codes, codes)
        expected = torch.arange(k)
        expected[-1] = k - 2
        assert torch.equal(index, expected), k
        assert searched == 0


@pytest.mark.parametrize("clone", CLONES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 31, 64, 129, 256, 512])
def test_every_d_and_ragged_sizes(clone, d):
    for n, k in ((1, 1), (13, 50), (29, 700), (265, 2049 if d < 64 else 97)):
        x, codes = torch.randn(n, d), torch.randn(k, d)
        expected = contract_index(x[:, None], codes[None])[:, 0]
        index, _, searched = search(clone, x, codes)
        assert torch.equal(index, expected)
        assert searched == 0 or d == 1  # on a line, many codes are nearly as near


@pytest.mark.parametrize("clone", CLONES, ids=str)
@pytest.mark.parametrize("d", [4, 8, 64])
def test_plain_data_settle_in_one_cell_and_duplicates_in_two(clone, d):
    x, codes = torch.randn(256, d), torch.randn(4096, d)
    _, cells, searched = search(clone, x, codes)
    assert searched == 0
    plain = cells
    assert plain <= 4 * 256  # about one in every run of codes that holds a new best
    duplicated = codes.clone()
    duplicated[torch.randperm(4096)[:1638]] = codes[torch.randint(0, 4096, (1638,))]  # 40 %
    _, cells, searched = search(clone, x, duplicated)
    assert searched == 0
    assert cells <= plain + 256


@pytest.mark.parametrize("clone", CLONES, ids=str)
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_an_offset_changes_no_path(clone, offset):
    x, codes = torch.randn(256, 8) + offset, torch.randn(4096, 8) + offset
    index, cells, searched = search(clone, x, codes)
    assert torch.equal(index, contract_index(x[:, None], codes[None])[:, 0])
    assert searched == 0
    assert cells <= 4 * 256
    _, cells_off_center, searched = search(clone, x, codes, center=torch.zeros(8))
    assert cells_off_center + 256 * searched > cells or offset < 100  # the center makes the difference


@pytest.mark.parametrize("clone", CLONES, ids=str)
def test_what_no_bound_can_settle_is_searched(clone):
    """Brute force, reason by reason, for these queries and no others; it finds the contract's index too."""
    x, codes = torch.randn(60, 4), torch.randn(1000, 4)

    def searched(x, codes):
        index, _, count = search(clone, x, codes)
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
    index, _, count = search(clone, x, codes * 1e30, center=torch.zeros(4))  # queries in range, no code
    assert torch.equal(index, contract_index(x[:, None], codes[None] * 1e30)[:, 0])
    assert count == 60
    outlier = codes.clone()
    outlier[7] = torch.inf
    outlier[8, 2] = 1e25
    assert searched(x, outlier) == 0  # they win for none of these queries
    outlier[9, 0] = torch.nan
    assert searched(x, outlier) == 60


@pytest.mark.parametrize("isa", [isa for isa, int16 in CLONES if int16])
@pytest.mark.parametrize("d", [2, 3, 4, 8, 17, 64])
def test_when_int16_is_used(isa, d):
    """With enough queries, and no longer once a far vector sets the scale and leaves the others few bits."""

    def settled_by_int16(x, codes, **named):
        index, cells, searched, settled = counted_search((isa, True), x, codes, **named)
        assert torch.equal(index, contract_index(x[:, None], codes[None])[:, 0])
        assert searched <= len(x) // 100 * 5  # those of a far query: all codes are nearly as near
        assert cells <= 30 * len(x)
        return settled

    x, codes = torch.randn(300, d), torch.randn(4096, d)
    center = torch.zeros(d)
    assert settled_by_int16(x, codes) >= 300
    assert settled_by_int16(1e-9 * x, 1e-9 * codes) >= 300
    assert settled_by_int16(x[:23], codes) == 0
    assert settled_by_int16(x[:, :1], codes[:, :1] + 3.0 * torch.arange(4096)[:, None]) == 0  # d = 1
    for far in (x, codes):
        before = far[77].clone()
        far[77] = 1e5
        assert settled_by_int16(x, codes, center=center) == 0
        far[77] = before
    assert settled_by_int16(x, codes) >= 300


@pytest.mark.parametrize("isa", [isa for isa, int16 in CLONES if int16])
def test_the_scale_follows_blocks_and_runs(isa):
    """A scale of the last block's queries, or one too large for the next run, would make int16 inefficient."""
    codes = torch.randn(417, 31)
    x = codes[torch.randint(417, (1040,))] + 1e-3 * torch.randn(1040, 31)
    index, _, _, settled = counted_search((isa, True), x, codes, center=torch.zeros(31), tiles=1)
    assert torch.equal(index, contract_index(x[:, None], codes[None])[:, 0])
    assert settled > 1040
    assert settled % 1040 == 0  # all queries in all runs
    codes = torch.nn.functional.normalize(torch.randn(2000, 4), dim=1)
    codes[:1000] *= 0.01
    x = 0.009 * torch.randn(30, 4)
    index, _, _, settled = counted_search((isa, True), x, codes, center=torch.zeros(4), tiles=1)
    assert torch.equal(index, contract_index(x[:, None], codes[None])[:, 0])
    assert settled >= 30 * 4
    assert settled == 30 * {1: -(-2000 // 64), 3: -(-2000 // 128)}[isa]


@pytest.mark.parametrize("clone", CLONES, ids=str)
@pytest.mark.parametrize("d", [2, 4, 33])
def test_runs_of_codes_of_very_different_lengths(clone, d):
    """The best distance of one run is far outside the scale of the next, and the last run is not full."""
    codes = torch.randn(2100, d) * 100.0 ** torch.linspace(2, -2, 2100)[:, None]
    for x in (torch.randn(50, d), 0.01 * torch.randn(50, d), codes[::42] * 1.1):
        for order in (codes, codes.flip(0)):
            index, _, _ = search(clone, x, order.contiguous(), center=torch.zeros(d), tiles=1)
            assert torch.equal(index, contract_index(x[:, None], order[None])[:, 0])


@pytest.mark.parametrize("clone", CLONES, ids=str)
@pytest.mark.parametrize(
    ("d", "k", "rows"), [(4, 1000, 1), (4, 5003, 40), (8, 9001, 60), (33, 3000, 9), (3, 3001, 2), (31, 1441, 40)]
)
@pytest.mark.parametrize("tiles", [0, 1])
def test_duplicates_are_excluded(clone, d, k, rows, tiles):
    """Many duplicates of each code: all but the first are excluded, and no query takes brute force."""
    x, codes = torch.randn(300, d), torch.randn(rows, d)
    codes = codes[torch.randint(0, rows, (k,))]
    codes[k // 2 :, 0] += 0.5 * (torch.arange(k - k // 2) % 2)
    codes[codes == 0] = -0.0  # other bits, the same value
    index, _, searched = search(clone, x, codes, tiles=tiles)
    assert torch.equal(index, contract_index(x[:, None], codes[None])[:, 0])
    assert searched == 0
    zeros = torch.zeros(1000, d)
    zeros[torch.randperm(1000)[:500]] = -0.0
    index, _, _ = search(clone, x, zeros, tiles=tiles)
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
    codes = torch.randn(1, k // 2, d).repeat(1, 2, 1)  # every code has a duplicate, in another thread's range
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
