"""The public stateless operations: each checks its arguments, picks an implementation and calls one operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from revq_kernels.autograd import CodebookGradient
from revq_kernels.dispatch import operator
from revq_kernels.reference import gather_codes
from revq_kernels.validation import (
    check_codebook,
    check_count,
    check_counted,
    check_indices,
    check_metric,
    check_reset,
    check_search,
    check_segments,
)


class Quantized(NamedTuple):
    """What `quantize` returns: the nearest codes and their indices."""

    quantized: Tensor
    indices: Tensor


def nearest_code(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", weight: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Find the nearest code of each query in its group's codebook (paper, Eq. 1).

    The index is the exactness contract's, bit for bit, whichever implementation runs: the smallest float32 squared
    distance, the lowest index among equals, a NaN distance before every number.  No N x K matrix is built.

    Args:
        x: ``[..., G, d]``, float32, bfloat16 or float16 (converted exactly), any strides.
        codebook: ``[G, K, d]``, one of the same dtypes, any strides.
        metric: "l2"; "inner_product", the largest sum of x_j c_kj; or "diagonal", the smallest sum of
            w_j (x_j - c_kj)^2.  The last two run on the reference, in chunks (`explain` says so).
        weight: w of "diagonal", in x's shape, one of the same dtypes; None otherwise.
        impl: "auto" (the device's own kernels, else the reference), "native" (C++ on the CPU), "triton" (on a GPU, or
            interpreted on the CPU under TRITON_INTERPRET=1) or "reference".

    Returns:
        int64 ``[..., G]``, each in [0, K).

    Raises:
        ValueError: for shapes or devices that do not fit, K = 0, an unknown ``impl`` or ``metric``, a missing or
            unexpected weight, or a metric that the ``impl`` requested by name does not support.
        TypeError: for another dtype, or an argument that is not a tensor.
        NativeUnavailableError, TritonUnavailableError: for an implementation requested by name that cannot run.
    """
    check_search(x, codebook)
    if metric == "l2" and weight is None:
        return operator("nearest_code", impl, x)(_detached(x), codebook.detach())
    check_metric(metric, weight, x)
    weight = None if weight is None else weight.detach()
    return operator("nearest_by_metric", impl, x, metric=metric)(x.detach(), codebook.detach(), weight, metric)


def quantize(
    x: Tensor, codebook: Tensor, *, count: Tensor | None = None, impl: str = "auto", deterministic: bool = True
) -> Quantized:
    """Replace each query by its nearest code; optionally count how often each code is selected, in the same call.

    ``quantized`` carries a gradient to the codebook (the segment sum of the queries' gradients) and none to x: an argmin
    has no slope.  `FastChannelVQ` adds the straight-through estimator.

    Args:
        x: ``[..., G, d]`` as for `nearest_code`.
        codebook: ``[G, K, d]``.
        count: contiguous int64 ``[G, K]``; the number of queries that selected each code is added in place.  Or None.
        impl: as for `nearest_code`.
        deterministic: sum the codebook's gradient in one order, so that equal inputs give equal bits.  False lets
            the Triton kernels add atomically, which is faster; the other implementations have one order only.

    Returns:
        ``quantized`` ``[..., G, d]`` in x's dtype and ``indices`` int64 ``[..., G]``.

    Raises:
        As `nearest_code`; also ValueError or TypeError for a count of another shape, dtype or device.
    """
    check_search(x, codebook)
    if count is not None:
        check_count(count, codebook.shape[0], codebook.shape[1], x)
    quantized, indices = operator("quantize", impl, x)(_detached(x), codebook.detach(), count)
    if count is not None:
        _mark_changed(count)
    return Quantized(_with_codebook_gradient(codebook, quantized, indices, impl, deterministic), indices)


def look_up(
    codebook: Tensor, indices: Tensor, dtype: torch.dtype, *, impl: str = "auto", deterministic: bool = True
) -> Tensor:
    """The rows of codebook ``[G, K, d]`` at indices ``[..., G]`` (not checked): ``[..., G, d]`` in ``dtype``.

    They carry the same gradient to the codebook as the result of `quantize`.
    """
    rows = gather_codes(codebook.detach(), indices, dtype)
    return _with_codebook_gradient(codebook, rows, indices, impl, deterministic)


def segment_sum(
    values: Tensor, indices: Tensor, num_codes: int, *, impl: str = "auto", deterministic: bool = True
) -> Tensor:
    """Sum the rows of ``values`` that have the same index: the gradient of a codebook, and the sums of k-means and EMA.

    Args:
        values: ``[..., G, d]``, float32, bfloat16 or float16, any strides.
        indices: int64 ``[..., G]``, each in [0, K).
        num_codes: K.
        impl: as for `nearest_code`.
        deterministic: as for `quantize`.

    Returns:
        float32 ``[G, K, d]``, summed in float32 over the queries in order; zeros where no row has the index.
        It carries no gradient.

    Raises:
        ValueError: for shapes or devices that do not fit, or, on the CPU, an index outside [0, K).
        TypeError: for another dtype.
        NativeUnavailableError, TritonUnavailableError: as for `nearest_code`.
    """
    check_segments(values, indices, num_codes)
    return operator("segment_sum", impl, values, deterministic)(values.detach(), indices, num_codes)


def count_codes_(count: Tensor, indices: Tensor, *, impl: str = "auto") -> Tensor:
    """Add to ``count`` how often each code occurs in ``indices``.

    Args:
        count: contiguous int64 ``[G, K]``, changed in place.
        indices: int64 ``[..., G]``, each in [0, K).
        impl: as for `nearest_code`.

    Returns:
        ``count``.

    Raises:
        ValueError: for shapes or devices that do not fit.
        TypeError: for another dtype.
        IndexError, RuntimeError: from the kernel, for an index outside [0, K); count is then unchanged.
    """
    check_indices(indices)
    check_count(count, indices.shape[-1], None, indices)
    operator("count_codes_", impl, indices)(count, indices)
    _mark_changed(count)
    return count


def utilization(count: Tensor) -> Tensor:
    """Share of each codebook's codes that were selected at least once: count ``[G, K]`` -> float32 ``[G]``.

    Raises:
        ValueError, TypeError: for a count that is not int64 ``[G, K]``.
    """
    check_counted(count)
    return (count > 0).sum(dim=1).float() / count.shape[1]  # no float64, which not every device has


def perplexity(count: Tensor) -> Tensor:
    """exp of the entropy of the selections, between 1 and K: count ``[G, K]`` -> float32 ``[G]``.

    A codebook without any selection has no distribution: NaN.

    Raises:
        ValueError, TypeError: for a count that is not int64 ``[G, K]``.
    """
    check_counted(count)
    share = count.float() / count.sum(dim=1, keepdim=True)
    return (-torch.xlogy(share, share).sum(dim=1)).exp()


@torch.no_grad()
def reset_codes_(
    codebook: Tensor,
    count: Tensor,
    *,
    noise: float = 0.1,
    max_fraction: float = 1.0,
    pairing: str = "paper",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move each dead code (count 0) to a frequently selected code, plus noise (paper, Eq. 2 and section 3.2.2).

    Per group r codes move: all dead ones, or as many of them as ``max_fraction`` allows.

    * "paper": the codes are ordered by (count, index).  The u-th of the first r goes to the u-th from the end: dead codes
      in the order of their indices, used codes from the busiest on, of equal counts the higher index first.  A pair whose
      source is itself dead is skipped.
    * "release", as the released code: the codes are ordered from the busiest on, of equal counts the lower index first.
      The u-th of the *last* r goes to the u-th of the first r, also where that one is dead.

    With distinct counts of the used codes, a limit that does not bind and at least r used codes both are the same.
    Every source row is read before any row is written.

    Which rows move, and onto which, is the same on every device; the noise is the same per device type for one
    generator: it is drawn for the moved rows only, in the order of their group and index.

    Args:
        codebook: ``[G, K, d]``, changed in place.
        count: int64 ``[G, K]``, how often each code was chosen; left as it is.
        noise: standard deviation of the Gaussian noise, in the units of the codebook (the release: 0.1).
        max_fraction: share of K that may move in one call, rounded down to whole codes (the paper: 1.0; the release: 0.2).
        pairing: "paper" or "release".
        generator: source of the noise, on the codebook's device.

    Returns:
        bool ``[G, K]``: the rows that were moved, whose optimizer state the caller should clear.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
    """
    check_codebook(codebook)
    num_groups, num_codes, _ = codebook.shape
    check_count(count, num_groups, num_codes, codebook)
    check_reset(noise, max_fraction, pairing)

    limit = int(max_fraction * num_codes)
    dead = (count == 0).sum(dim=1, keepdim=True).clamp(max=limit)  # [G, 1], the r of Eq. 2
    position = torch.arange(num_codes, device=count.device).expand(num_groups, num_codes)
    paired = position < dead
    if pairing == "paper":
        target = torch.sort(count, dim=1, stable=True).indices  # [G, K], deadest first
        source = target.flip(1)
        paired &= count.gather(1, source) > 0
    else:
        source = torch.sort(count, dim=1, stable=True, descending=True).indices  # [G, K], busiest first
        target = source.gather(1, (position - dead) % num_codes)  # the last r, then the others
    partner = torch.full_like(count, -1).scatter_(1, target, torch.where(paired, source, -1))
    moved = partner >= 0
    group, code = moved.nonzero(as_tuple=True)  # on a device, the one time that the host waits for it
    rows = codebook[group, partner[group, code]].float()  # [moved, d]
    if noise > 0:
        rows += noise * torch.randn(rows.shape, generator=generator, device=codebook.device)
    codebook[group, code] = rows.to(codebook.dtype)
    return moved


def _with_codebook_gradient(codebook: Tensor, rows: Tensor, indices: Tensor, impl: str, deterministic: bool) -> Tensor:
    """``rows`` as a node that depends on the codebook, where its gradient may be requested."""
    if not (codebook.requires_grad and torch.is_grad_enabled()):
        return rows
    return CodebookGradient.apply(codebook, rows, indices, impl, deterministic)


def _detached(x: Tensor) -> Tensor:
    """x without its graph.  The condition matters: creating a view costs as much as a small search."""
    return x.detach() if x.requires_grad else x


def _mark_changed(tensor: Tensor) -> None:
    """Bump the version counter: an operator with a native kernel does not do so for an argument that it mutates."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
