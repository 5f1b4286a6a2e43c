"""The public operations: check the arguments, choose an implementation, call its operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from revq_kernels import ops
from revq_kernels.autograd import CodebookGradient
from revq_kernels.dispatch import variant
from revq_kernels.reference import gather_codes
from revq_kernels.validation import check_count, check_indices, check_metric, check_search


class Quantized(NamedTuple):
    """What `quantize` returns: the chosen codes and their numbers."""

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
        ValueError: for shapes or devices that do not fit, K = 0, an unknown ``impl`` or ``metric``, a weight missing or
            too many, or a metric that the ``impl`` asked for by name does not have.
        TypeError: for another dtype, or something that is no tensor.
        NativeUnavailableError, TritonUnavailableError: for an implementation that is asked for and cannot run.
    """
    check_search(x, codebook)
    if metric == "l2" and weight is None:
        return ops.overload("nearest_code", variant(impl, x))(_without_graph(x), codebook.detach())
    check_metric(metric, weight, x)
    weight = None if weight is None else weight.detach()
    return ops.overload("nearest_by_metric", variant(impl, x, metric))(x.detach(), codebook.detach(), weight, metric)


def quantize(
    x: Tensor, codebook: Tensor, *, count: Tensor | None = None, impl: str = "auto", deterministic: bool = True
) -> Quantized:
    """Replace each query by its nearest code; count the choices in the same call.

    ``quantized`` carries a gradient to the codebook (the segment sum of the queries' gradients) and none to x: an argmin
    has no slope.  `FastChannelVQ` adds the straight-through estimator.

    Args:
        x: ``[..., G, d]`` as for `nearest_code`.
        codebook: ``[G, K, d]``.
        count: contiguous int64 ``[G, K]`` to which the number of times each code was chosen is added in place, or None.
        impl: as for `nearest_code`.
        deterministic: add the codebook's gradient up in one order, so that equal inputs give equal bits.  False lets
            Triton's kernels add atomically, which is faster; the other implementations have one order only.

    Returns:
        ``quantized`` ``[..., G, d]`` in x's dtype and ``indices`` int64 ``[..., G]``.

    Raises:
        As `nearest_code`; also ValueError or TypeError for a count of another shape, dtype or device.
    """
    check_search(x, codebook)
    if count is not None:
        check_count(count, codebook.shape[0], codebook.shape[1], x)
    chosen = variant(impl, x)
    quantized, indices = ops.overload("quantize", chosen)(_without_graph(x), codebook.detach(), count)
    if count is not None:
        _mark_changed(count)
    return Quantized(_from_codebook(codebook, quantized, indices, chosen, deterministic), indices)


def look_up(codebook: Tensor, indices: Tensor, dtype: torch.dtype, *, deterministic: bool = True) -> Tensor:
    """The rows of codebook ``[G, K, d]`` that indices ``[..., G]``, unchecked, choose: ``[..., G, d]`` in ``dtype``.

    They carry the gradient to the codebook that `quantize` gives them.
    """
    rows = gather_codes(codebook.detach(), indices, dtype)
    return _from_codebook(codebook, rows, indices, "default", deterministic)


def _from_codebook(codebook: Tensor, rows: Tensor, indices: Tensor, chosen: str, deterministic: bool) -> Tensor:
    """``rows`` as a node that depends on the codebook, where somebody may ask for its gradient."""
    if not (codebook.requires_grad and torch.is_grad_enabled()):
        return rows
    if not deterministic and (chosen == "triton" or rows.device.type == "cuda"):
        chosen = "atomic"
    return CodebookGradient.apply(codebook, rows, indices, chosen)


def count_codes_(count: Tensor, indices: Tensor, *, impl: str = "auto") -> Tensor:
    """Add to ``count`` how often each code stands in ``indices``.

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
    ops.overload("count_codes_", variant(impl, indices))(count, indices)
    _mark_changed(count)
    return count


def _without_graph(x: Tensor) -> Tensor:
    """x as operators take it: a view where there is a graph to leave, which on a short search takes a while."""
    return x.detach() if x.requires_grad else x


def _mark_changed(tensor: Tensor) -> None:
    """Bump the version counter, which operators that mutate an argument natively leave alone."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensor)
