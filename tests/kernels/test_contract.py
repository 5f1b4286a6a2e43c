"""The exactness contract, on every problem, for every implementation."""

import subprocess
import sys

import pytest
import torch

import revq_kernels
from revq_kernels import nearest_code, quantize
from revq_kernels.testing.problems import Problem, assert_same_codes, contract_index, problems

PROBLEMS = list(problems())


@pytest.fixture(params=PROBLEMS, ids=[p.name for p in PROBLEMS])
def problem(request) -> Problem:
    return request.param


def test_index_is_the_contracts(problem, impl):
    assert_same_codes(nearest_code(problem.x, problem.codebook, impl=impl), problem.x, problem.codebook)


def test_quantize_returns_rows_and_counts(problem, impl):
    x, codebook = problem.x, problem.codebook
    num_groups, num_codes, _ = codebook.shape
    count = torch.full((num_groups, num_codes), 3)
    quantized, indices = quantize(x, codebook, count=count, impl=impl)
    assert_same_codes(indices, x, codebook)
    assert quantized.dtype == x.dtype and quantized.shape == x.shape
    rows = codebook[torch.arange(num_groups), indices].to(x.dtype)
    assert torch.equal(quantized.nan_to_num(7.0), rows.nan_to_num(7.0))
    expected = torch.stack(
        [torch.bincount(indices.reshape(-1, num_groups)[:, g], minlength=num_codes) for g in range(num_groups)]
    )
    assert torch.equal(count, expected + 3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_index_is_the_same_for_any_thread_count_and_batch(impl, threads):
    if impl == "triton" and threads > 1:
        pytest.skip("the interpreter has one thread")
    rows, codes = (61, 100) if impl == "triton" else (301, 1000)
    x, codebook = torch.randn(rows, 2, 8), torch.randn(2, codes, 8).repeat(1, 2, 1)
    expected = contract_index(x, codebook)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(nearest_code(x, codebook, impl=impl), expected)
        pieces = [nearest_code(piece, codebook, impl=impl) for piece in x.split(37)]
        assert torch.equal(torch.cat(pieces), expected)
    finally:
        torch.set_num_threads(before)


def test_denormals_count_even_when_torch_flushes_them(impl):
    x, codebook = torch.randn(50, 1, 4) * 1e-20, torch.randn(1, 300, 4) * 1e-20
    expected = contract_index(x, codebook)
    assert torch.set_flush_denormal(True)
    try:
        found = nearest_code(x, codebook, impl=impl)
        still_flushes = bool(torch.tensor(1e-38) * 0.01 == 0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)
    assert still_flushes, "the caller's mode was not restored"


def test_denormals_count_in_threads_that_started_with_flushing_on():
    """Large enough for several torch threads; threads started while denormals are flushed keep flushing them."""
    program = (
        "import torch\n"
        "torch.set_flush_denormal(True); torch.set_num_threads(2)\n"
        "(torch.randn(2000000) * 2).sum()\n"
        "from revq_kernels import nearest_code\n"
        "from revq_kernels.testing.problems import contract_index\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x = torch.randint(-999, 999, (300, 1, 4), generator=g).double() * 1e-23\n"
        "c = torch.randint(-999, 999, (1, 300, 4), generator=g).double() * 1e-23\n"
        "torch.set_flush_denormal(False); x, c = x.float(), c.float(); expected = contract_index(x, c)\n"
        "torch.set_flush_denormal(True)\n"
        "for default in (torch.float32, torch.float64, torch.float16):\n"
        "    torch.set_default_dtype(default)\n"
        "    for impl in ('native', 'reference'):\n"
        "        assert torch.equal(nearest_code(x, c, impl=impl), expected), (impl, default)\n"
        "    assert torch.tensor(1e-38, dtype=torch.float32) * 0.01 == 0, 'the mode was not restored'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_suite_can_fail():
    """A float64 search, and one that ignores the tie rule, do not pass as the contract."""
    x, codebook = PROBLEMS[[p.name for p in PROBLEMS].index("duplicate-codes")][1:]
    distance = torch.cdist(x.transpose(0, 1), codebook).transpose(0, 1)
    last = codebook.shape[1] - 1 - distance.flip(-1).argmin(-1)
    with pytest.raises(AssertionError, match="differ from the contract"):
        assert_same_codes(last, x, codebook)
    x, codebook = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 2.0**-13], [1.0, 0.0]]])  # 1 + 2^-26 rounds to 1: a tie
    exact = (x[:, :, None].double() - codebook[None].double()).square().sum(-1).argmin(-1)
    with pytest.raises(AssertionError, match="differ from the contract"):
        assert_same_codes(exact, x, codebook)


@pytest.mark.parametrize("d", [1, 4, 8, 64])
def test_contract_is_no_farther_than_its_own_rounding(d):
    """In float64, the selected code's distance exceeds the true minimum by no more than the rounding error of D."""
    x, codebook = torch.randn(100, 1, d), torch.randn(1, 500, d)
    distance = ((x.double() - codebook.double()) ** 2).sum(-1)
    chosen = distance.gather(1, nearest_code(x, codebook)).squeeze(1)
    rounding = (
        2 * (d + 2) * 2.0**-24 * distance.amin(1)
    )  # relative errors of the subtractions, the products and the d sums
    assert bool((chosen <= distance.amin(1) + rounding).all())


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 31])
def test_every_isa_clone_of_the_exact_pass_gives_the_contracts_keys(d):
    """The upper word bit for bit, a NaN before every number, the lower index among equals; any number of queries."""
    dev = pytest.importorskip("revq_kernels._dev", reason="the tests' window is built with REVQ_DEV=1")
    assert dev.cpu_isa() < 4
    for panels in (1, 2, 5):
        codes = torch.randn(panels * dev.LANES, d)
        codes[::3] = codes[len(codes) // 2]  # equal codes within one panel and in several
        packed = codes.reshape(panels, dev.LANES, d).transpose(1, 2).contiguous()
        for n in (1, 2, 3, 4, 9):
            x = torch.randn(n, d)
            x[n // 2] = codes[len(codes) // 2]
            for strange in (None, torch.inf, -torch.inf, torch.nan):
                if strange is not None:
                    x[-1, d - 1] = packed[panels // 2, d - 1, 7] = packed[-1, d - 1, 11] = strange
                rows = packed.transpose(1, 2).reshape(1, -1, d)
                distance = torch.zeros(n, rows.shape[1])
                for j in range(d):
                    distance = distance + (x[:, None, j] - rows[..., j]) ** 2
                bits = torch.where(distance.isnan(), -1, distance.view(torch.int32).long())
                keys = (bits * 2**32 + torch.arange(100, 100 + rows.shape[1])).amin(1)
                for isa in range(dev.cpu_isa() + 1):
                    found = torch.from_numpy(dev.run_tile(isa, x.numpy(), packed.numpy(), 100))
                    assert torch.equal(found, keys), (isa, panels, n, strange)
    with pytest.raises(ValueError, match="no such clone"):
        dev.run_tile(dev.cpu_isa() + 1, x.numpy(), packed.numpy())


def test_explain_names_the_implementation(impl):
    x, codebook = torch.randn(2, 1, 4), torch.randn(1, 8, 4)
    choice = revq_kernels.explain(x, codebook, impl=impl)
    assert choice.implementation == impl
    assert str(choice).startswith(impl + ": ")
