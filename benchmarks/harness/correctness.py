"""Checks of indices: an error for a wrong index of this library, and the share of wrong indices for every provider.

Nothing of this library is timed while one of its results is wrong.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.cases import Case
from revq_kernels import nearest_code, quantize
from revq_kernels.testing.exhaustive import exhaustive_search, squared_distance
from revq_kernels.testing.problems import Problem, problems, segment_sum_truth

PAIRS = {"cuda": 1 << 34, "cpu": 1 << 25}
"""Most pairs that one check computes, per device type; in larger problems evenly spaced queries are checked."""

TOLERANCE = 1e-6


class WrongResultError(SystemExit):
    """Ends the run with exit status 1; the message names the wrong result."""


class WrongShares(NamedTuple):
    """Shares of the checked indices: of a farther code, and of a duplicate of the nearest code with another index."""

    farther: float
    other_duplicate: float


def spaced_rows(num_queries: int, pairs_per_query: int, device: torch.device) -> Tensor:
    """Rows of the queries to check: int64, ascending, evenly spaced."""
    count = max(1, min(num_queries, PAIRS.get(device.type, 1 << 25) // pairs_per_query))
    return torch.arange(count, device=device) * num_queries // count


class Float64Truth:
    """The nearest codes of one problem in float64, computed once and compared with every provider.

    Args:
        x: ``[N, G, d]``.
        codebook: ``[G, K, d]``.
        rows: the queries to check; None for as many evenly spaced ones as `PAIRS` allows.
    """

    def __init__(self, x: Tensor, codebook: Tensor, rows: Tensor | None = None) -> None:
        self.rows = spaced_rows(x.shape[0], codebook.shape[0] * codebook.shape[1], x.device) if rows is None else rows
        self.x, self.codebook = x[self.rows], codebook
        self.nearest = exhaustive_search(self.x, codebook, torch.float64)

    def wrong_shares(self, indices: Tensor) -> WrongShares:
        """Compare indices int64 ``[N, G]``; an index outside the codebook counts as farther.

        Farther: the float64 squared distance exceeds the smallest by more than one part in a million.
        """
        indices = indices[self.rows].to(self.codebook.device).long()
        valid = (indices >= 0) & (indices < self.codebook.shape[1])
        group = torch.arange(self.codebook.shape[0], device=self.codebook.device)
        codes = self.codebook[group, torch.where(valid, indices, 0)]
        distance = squared_distance(self.x, codes, torch.float64)
        farther = ~valid | (distance > self.nearest.distance * (1 + TOLERANCE))
        equal = (codes == self.codebook[group, self.nearest.index]).all(-1)
        other_duplicate = valid & equal & (indices != self.nearest.index)
        return WrongShares(farther.double().mean().item(), other_duplicate.double().mean().item())


def check_contract_suite(device: torch.device) -> int:
    """Compare the device with the reference on the CPU on every contract problem; return the number of problems.

    Raises:
        WrongResultError: for a wrong index, value, count or gradient.
    """
    suite = list(problems())
    for problem in suite:
        moved = Problem(problem.name, same_strides(problem.x, device), same_strides(problem.codebook, device))
        _check_problem(problem, moved)
    return len(suite)


def check_case(case: Case, x: Tensor, codebook: Tensor, indices: Tensor) -> int:
    """Compare indices ``[N, G]`` of a case with the contract's, on the device; return the number of pairs computed.

    Raises:
        WrongResultError: for a wrong index.
    """
    rows = spaced_rows(case.N, case.G * case.K, x.device)
    truth = exhaustive_search(x[rows], codebook).index
    wrong = (indices[rows] != truth).nonzero()
    if len(wrong):
        n, g = wrong[0].tolist()
        raise WrongResultError(
            f"{case.name}: {len(wrong)} of {truth.numel()} indices are wrong, the first at query {rows[n].item()}, "
            f"group {g}: got {indices[rows][n, g].item()}, expected {truth[n, g].item()}"
        )
    return len(rows) * case.G * case.K


def same_strides(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device with the same strides; ``Tensor.to`` would make it contiguous and leave strides untested."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _check_problem(problem: Problem, moved: Problem) -> None:
    truth = nearest_code(problem.x, problem.codebook, impl="reference")
    _check_equal(problem, "index", nearest_code(moved.x, moved.codebook).cpu(), truth)
    num_groups, num_codes, _ = problem.codebook.shape
    count = torch.zeros(num_groups, num_codes, dtype=torch.int64)
    values, _ = quantize(problem.x, problem.codebook, count=count, impl="reference")
    moved_count = torch.zeros_like(count, device=moved.x.device)
    codebook = moved.codebook.clone().requires_grad_()
    moved_values, moved_indices = quantize(moved.x, codebook, count=moved_count)
    _check_equal(problem, "index of quantize", moved_indices.cpu(), truth)
    _check_equal(problem, "value", moved_values.detach().cpu().nan_to_num(), values.nan_to_num())
    _check_equal(problem, "count", moved_count.cpu(), count)
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values.dtype)
    (gradient,) = torch.autograd.grad(moved_values, codebook, weight.to(moved.x.device))
    total, budget = segment_sum_truth(weight, truth, num_codes)
    rounding = 0 if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
    error = (gradient.cpu().double() - total).abs() - total.abs() * rounding
    if not bool((error <= budget).all()):
        raise WrongResultError(f"{problem.name}: the codebook's gradient is off by up to {error.max().item():.3g}")


def _check_equal(problem: Problem, what: str, got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise WrongResultError(f"{problem.name}: {what}: {got.dtype} {tuple(got.shape)}, expected {expected.dtype}")
    wrong = int((got != expected).sum())
    if wrong:
        raise WrongResultError(f"{problem.name}: {what}: {wrong} of {expected.numel()} are wrong")
