"""The Triton kernels in Triton's interpreter: every form on every problem, and every branch between them.

`make test` runs this file in its own process, because TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import pytest
import torch

from revq_kernels import TritonUnavailableError, explain, nearest_code, quantize, triton
from revq_kernels.testing.problems import Problem, assert_same_codes, problems

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own: `make test` does that", allow_module_level=True)

from revq_kernels.triton import launches
from revq_kernels.triton import plan as planning
from revq_kernels.triton.addressing import grouped_rows
from revq_kernels.triton.plan import FirstPassConfig, LaneLayout

COVERED_ELSEWHERE = {
    "gauss-d256",  # fma: the same loop as d = 64; tensor_core: test_triton_long_vectors.py
    *("lattice-d2", "lattice-d8"),  # the code that resolves ties does not depend on d: 1, 4 and 31 remain
    *("query--inf", "code--inf", "both-inf"),  # norms do not depend on the sign: both--inf remains
    *("float16", "bfloat16-x", "bfloat16-codebook"),  # queries and codes are converted separately: one of each remains
}
"""Problems that reach no branch of a first pass that the others do not reach; test_contract.py runs all of them."""
PROBLEMS = [p for p in problems() if p.x.numel() and p.name not in COVERED_ELSEWHERE]
TARGET = planning.Target("sm_90", 1, "interpreter")


def small_blocks(form: str, d: int) -> FirstPassConfig | None:
    """Blocks small enough that small problems have several tiles and steps; the interpreter is slow per operation."""
    if form == "tensor_core":
        depth = max(2, 1 << (d - 1).bit_length()) if d < planning.MIN_LONG_D else 64
        return FirstPassConfig(form, 32, 64, LaneLayout(4, 2, 4, 2), 2, 4, depth=depth)
    if form == "fma" and d > 16:
        return FirstPassConfig(form, 64, 128, LaneLayout(1, 1, 128, 1), 2, 4)
    if form == "fma":
        unroll = planning.default_first_pass(form, d, "sm_90").unroll
        return FirstPassConfig(form, 32, 64, LaneLayout(1, 1, 64, 1), 2, 4, unroll=unroll)
    return None


def run(problem: Problem, form: str, *, splits_for: int = 1, rows_per_chunk: int | None = None, **changes):
    """(indices ``[..., G]``, certified bool ``[N * G]``, None for the direct form) by the given form."""
    x, codebook = problem.x, problem.codebook
    num_groups, num_codes, d = codebook.shape
    rows = x.shape[:-2].numel()
    target = TARGET._replace(multiprocessors=splits_for)
    plan = planning.make_plan(rows, num_groups, num_codes, d, target, form, small_blocks(form, d))
    plan = plan._replace(inline_asm=False, **changes)
    if rows_per_chunk is not None:
        plan = plan._replace(rows_per_chunk=rows_per_chunk)
    indices = torch.full((rows, num_groups), -7)
    workspaces = launches.search(x, codebook, indices, None, None, plan)
    if form == "direct":
        return indices.view(x.shape[:-1]), None
    return indices.view(x.shape[:-1]), torch.cat([workspace.certified(plan.slots) for workspace in workspaces])


@pytest.fixture(params=PROBLEMS, ids=[p.name for p in PROBLEMS])
def problem(request) -> Problem:
    return request.param


@pytest.mark.parametrize("form", ["tensor_core", "fma"])
def test_index_follows_the_contract(problem, form):
    """These problems are too small for a first pass to pay: test_contract.py runs the direct form on them."""
    indices, _ = run(problem, form)
    assert_same_codes(indices, problem.x, problem.codebook)


def gaussian(n: int, g: int, k: int, d: int, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    return Problem("", torch.randn(n, g, d, generator=generator), torch.randn(g, k, d, generator=generator))


@pytest.mark.parametrize("form", ["tensor_core", "fma"])
@pytest.mark.parametrize("d", [4, 8, 33])
def test_the_first_pass_certifies_ordinary_queries(form, d):
    problem = gaussian(64, 2, 900, d)
    indices, certified = run(problem, form)
    assert certified.float().mean() > 0.97
    assert_same_codes(indices, problem.x, problem.codebook)


@pytest.mark.parametrize("form", ["tensor_core", "fma"])
def test_duplicate_codes_do_not_need_the_fallback(form):
    """Half of the codes have an exact duplicate, as in an initial codebook drawn with replacement."""
    problem = gaussian(64, 1, 1200, 8)
    problem.codebook[:, 600:900] = problem.codebook[:, torch.randperm(600)[:300]]
    mixed = problem.codebook[:, torch.randperm(1200)]
    indices, certified = run(Problem("", problem.x, mixed), form)
    assert_same_codes(indices, problem.x, mixed)
    assert certified.all()


@pytest.mark.parametrize("form", ["tensor_core", "fma"])
@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_a_mean_offset_does_not_need_the_fallback(form, offset):
    problem = gaussian(64, 1, 700, 4)
    problem = Problem("", problem.x + offset, problem.codebook + offset)
    indices, certified = run(problem, form)
    assert_same_codes(indices, problem.x, problem.codebook)
    assert certified.float().mean() > 0.9


@pytest.mark.parametrize("form", ["tensor_core", "fma"])
def test_queries_without_a_certificate_are_searched_over_all_codes(form):
    """A NaN code, a query out of range, and a query with more candidates than slots."""
    problem = gaussian(40, 2, 300, 4)
    problem.x[3, 1] = 1e9
    problem.x[5, 0, 2] = torch.nan
    indices, certified = run(problem, form)
    assert_same_codes(indices, problem.x, problem.codebook)
    failed = (~certified.view(40, 2)).nonzero().tolist()
    assert [3, 1] in failed and [5, 0] in failed and len(failed) < 5

    problem = gaussian(40, 2, 300, 4)
    problem.codebook[1, 17, 0] = torch.nan
    indices, certified = run(problem, form)
    assert_same_codes(indices, problem.x, problem.codebook)
    assert certified.view(40, 2)[:, 0].float().mean() > 0.9 and not certified.view(40, 2)[:, 1].any()

    same = Problem("", problem.x, torch.ones(2, 300, 4))
    indices, certified = run(same, form)
    assert not certified.any()
    assert_same_codes(indices, same.x, same.codebook)


@pytest.mark.parametrize("form", planning.FORMS)
@pytest.mark.parametrize("d", [3, 8])
def test_splits_of_the_codes_change_nothing(form, d):
    problem = gaussian(16, 2, 1100, d)
    once, _ = run(problem, form)
    many, certified = run(problem, form, splits_for=12)
    assert torch.equal(once, many)
    assert_same_codes(many, problem.x, problem.codebook)
    assert certified is None or certified.float().mean() > 0.97


@pytest.mark.parametrize("form", planning.FORMS)
def test_chunks_of_queries_change_nothing(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 24, 2, 4, generator=generator)[:, ::2]  # leading dimensions that do not fold into one
    problem = Problem("", x, torch.randn(2, 90, 4, generator=generator))
    for rows_per_chunk in (7, 24):
        indices, _ = run(problem, form, rows_per_chunk=rows_per_chunk)
        assert_same_codes(indices, problem.x, problem.codebook)


def test_chunks_are_all_rows_in_order():
    x = torch.arange(3 * 24 * 2 * 4).view(3, 24, 2, 4)[:, ::2]
    for rows in (1, 5, 7, 12, 13, 24, 30, 36, 1000):
        pieces = list(grouped_rows(x).chunks(rows))
        assert [first for first, _ in pieces] == [sum(p.count for _, p in pieces[:i]) for i in range(len(pieces))]
        assert all(piece.count <= rows for _, piece in pieces)
        assert torch.equal(torch.cat([piece.tensor.flatten(0, 1) for _, piece in pieces]), x.flatten(0, 1))


def test_three_leading_dimensions_that_do_not_fold():
    x = torch.randn(4, 4, 4, 2, 5)[::2, ::2, ::2]
    codebook = torch.randn(2, 30, 5)
    assert_same_codes(nearest_code(x, codebook, impl="triton"), x, codebook)


def test_explain_names_the_form_and_the_reason():
    x, codebook = torch.randn(2, 1, 4), torch.randn(1, 8, 4)
    assert "direct form on interpreter (too few codes" in str(explain(x, codebook, impl="triton"))


def test_auto_on_the_cpu_selects_native_or_reference():
    assert explain(torch.randn(2, 1, 4), torch.randn(1, 8, 4)).implementation in ("native", "reference")


def test_other_devices_are_refused():
    x, codebook = torch.empty(2, 1, 4, device="meta"), torch.empty(1, 8, 4, device="meta")
    with pytest.raises(TritonUnavailableError, match="they run CUDA tensors, got a tensor on meta"):
        nearest_code(x, codebook, impl="triton")


def test_the_atomic_gradient_equals_the_segment_sum():
    x, codebook = torch.randn(70, 2, 5), torch.randn(2, 6, 5, requires_grad=True)
    for deterministic in (True, False):
        codebook.grad = None
        quantize(x, codebook, impl="triton", deterministic=deterministic).quantized.square().sum().backward()
        expected = codebook.grad.clone()
        codebook.grad = None
        quantize(x, codebook, impl="reference").quantized.square().sum().backward()
        torch.testing.assert_close(codebook.grad, expected)
