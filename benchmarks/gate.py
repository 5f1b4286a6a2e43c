"""Nothing of ours is timed while one of its answers is wrong."""

import torch
from torch import Tensor

from benchmarks.harness.cases import Case
from benchmarks.harness.correctness import spaced_rows
from revq_kernels import nearest_code, quantize
from revq_kernels.testing.exhaustive import exhaustive
from revq_kernels.testing.problems import Problem, problems, segment_sum_truth


class WrongAnswerError(SystemExit):
    """Ends the run with exit status 1: its message says which answer is wrong."""


def check_suite(device: torch.device) -> int:
    """Run the contract suite on the device against the reference on the CPU; return how many problems it has.

    Raises:
        WrongAnswerError: for a wrong index, value, count or gradient.
    """
    suite = list(problems())
    for problem in suite:
        moved = Problem(problem.name, to_device(problem.x, device), to_device(problem.codebook, device))
        _check_problem(problem, moved)
    return len(suite)


def check_case(case: Case, x: Tensor, codebook: Tensor, indices: Tensor) -> int:
    """Hold indices ``[N, G]`` of a case against all codes, on the device; return the number of pairs looked at.

    Raises:
        WrongAnswerError: if one is not the contract's.
    """
    rows = spaced_rows(case.N, case.G * case.K, x.device)
    truth = exhaustive(x[rows], codebook).index
    wrong = (indices[rows] != truth).nonzero()
    if len(wrong):
        n, g = wrong[0].tolist()
        raise WrongAnswerError(
            f"{case.name}: {len(wrong)} of {truth.numel()} indices are wrong, the first at query {rows[n].item()}, "
            f"group {g}: got {indices[rows][n, g].item()}, expected {truth[n, g].item()}"
        )
    return len(rows) * case.G * case.K


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides: what an ordinary copy makes contiguous would not be tested."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _check_problem(problem: Problem, moved: Problem) -> None:
    truth = nearest_code(problem.x, problem.codebook, impl="reference")
    _same(problem, "index", nearest_code(moved.x, moved.codebook).cpu(), truth)
    num_groups, num_codes, _ = problem.codebook.shape
    count = torch.zeros(num_groups, num_codes, dtype=torch.int64)
    values, _ = quantize(problem.x, problem.codebook, count=count, impl="reference")
    moved_count = torch.zeros_like(count, device=moved.x.device)
    codebook = moved.codebook.clone().requires_grad_()
    moved_values, moved_indices = quantize(moved.x, codebook, count=moved_count)
    _same(problem, "index of quantize", moved_indices.cpu(), truth)
    _same(problem, "value", moved_values.detach().cpu().nan_to_num(), values.nan_to_num())
    _same(problem, "count", moved_count.cpu(), count)
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values.dtype)
    (gradient,) = torch.autograd.grad(moved_values, codebook, weight.to(moved.x.device))
    total, budget = segment_sum_truth(weight, truth, num_codes)
    rounding = 0 if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
    error = (gradient.cpu().double() - total).abs() - total.abs() * rounding
    if not bool((error <= budget).all()):
        raise WrongAnswerError(f"{problem.name}: the codebook's gradient is off by up to {error.max().item():.3g}")


def _same(problem: Problem, what: str, got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise WrongAnswerError(f"{problem.name}: {what}: {got.dtype} {tuple(got.shape)}, expected {expected.dtype}")
    wrong = int((got != expected).sum())
    if wrong:
        raise WrongAnswerError(f"{problem.name}: {what}: {wrong} of {expected.numel()} are wrong")
