"""Building blocks of the replaced methods: search, counts, sums and k-means of vectors against one or several codebooks."""

from collections.abc import Callable
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

from revq_kernels import count_codes_, nearest_code, segment_sum
from revq_kernels.interop.families.family import parameter_names

_DOUBLE_PAIRS = 1 << 22
"""Limit on the distances held at a time in the float64 search, which has no kernel."""


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The exact index of the nearest code for each vector of ``x`` ``[..., d]`` in ``codebook`` ``[K, d]``: int64 ``[...]``.

    No gradient, and no effect of autocast: bfloat16 and float16 operands are converted to float32 exactly.  float64
    operands are compared in float64, in blocks of rows.
    """
    if torch.float64 in (x.dtype, codebook.dtype):
        return _nearest_double(x.detach().double(), codebook.detach().double())
    return nearest_code(x.unsqueeze(-2), codebook.unsqueeze(0)).squeeze(-1)


def nearest_normalized(x: Tensor, codebook: Tensor) -> Tensor:
    """`nearest` after ``torch.nn.functional.normalize`` of the vectors and the codes.

    It normalizes in float32 or float64, because rounding directions to bfloat16 or float16 changes their neighbors.
    """
    return nearest(_direction(x), _direction(codebook))


def largest_inner_product(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the unit vector in ``codebook`` with the largest inner product; 0 for a zero vector, as argmax gives."""
    return nearest(x, codebook).masked_fill((x == 0).all(-1), 0)


def has_zero_code(codebook: Tensor) -> bool:
    """Whether a code is zero: normalizing leaves it zero, and its distance does not order inner products."""
    return not codebook.is_meta and bool((codebook.detach() == 0).all(-1).any())


def code_counts(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs in ``indices`` ``[N]``: int64 ``[num_codes]``; unlike bincount, without a graph break."""
    count = torch.zeros(1, num_codes, dtype=torch.int64, device=indices.device)
    return count_codes_(count, indices.unsqueeze(-1)).squeeze(0)


def code_sums(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """The sum of the vectors ``[h, n, d]`` that selected each code, in order, for ``h`` codebooks and indices ``[h, n]``.

    Returns:
        float32 ``[h, num_codes, d]``, float64 for a float64 ``x``.  No gradient.
    """
    x = x.detach()
    if x.dtype == torch.float64:
        row = (indices + torch.arange(len(x), device=x.device).unsqueeze(1) * num_codes).flatten()
        return (
            x.new_zeros(len(x) * num_codes, x.shape[-1]).index_add_(0, row, x.flatten(0, 1)).unflatten(0, (len(x), -1))
        )
    return segment_sum(x.transpose(0, 1), indices.transpose(0, 1), num_codes)


def kmeans(
    samples: Tensor,
    means: Tensor,
    num_iters: int,
    assign: Callable[[Tensor, Tensor], Tensor],
    all_reduce: Callable[[Tensor], object] = lambda tensor: None,
    normalize: Callable[[Tensor], Tensor] = lambda means: means,
) -> tuple[Tensor, Tensor]:
    """k-means of ``samples`` ``[h, n, d]`` from initial ``means`` ``[h, K, d]``, for ``h`` codebooks.

    Args:
        assign: gives the index of the mean, int64 ``[h, n]``, for each sample.
        all_reduce: sums a tensor over processes, in place.
        normalize: maps the means of each iteration to valid codes.

    Returns:
        Means ``[h, K, d]`` and their counts int64 ``[h, K]`` of the last iteration.  A mean without samples stays.
    """
    num_codes = means.shape[1]
    for _ in range(num_iters):
        indices = assign(samples, means)
        count = torch.zeros(len(indices), num_codes, dtype=torch.int64, device=indices.device)
        count_codes_(count, indices.transpose(0, 1))
        all_reduce(count)
        moved = (code_sums(samples, indices, num_codes) / count.clamp(min=1).unsqueeze(-1)).to(samples.dtype)
        all_reduce(moved)
        means = torch.where((count == 0).unsqueeze(-1), means, normalize(moved))
    return means, count


def with_kmeans(init_embed_: FunctionType, replacement: Callable) -> FunctionType:
    """A copy of a function of another library that calls ``replacement`` where the original calls its global ``kmeans``.

    What surrounds k-means differs between forks (warnings, the exchange among processes) and stays the original's.
    """
    names = {**init_embed_.__globals__, "kmeans": replacement}
    return FunctionType(init_embed_.__code__, names, init_embed_.__name__, init_embed_.__defaults__)


def kmeans_mismatch(init_embed_: FunctionType, replacement: Callable) -> str | None:
    """Why `with_kmeans` does not apply to a function; None if it does."""
    if "kmeans" not in init_embed_.__code__.co_names:
        return "its init_embed_ calls no function 'kmeans'"
    expected, found = parameter_names(replacement), parameter_names(init_embed_.__globals__["kmeans"])
    return None if found == expected else f"its kmeans takes ({', '.join(found)}); known is ({', '.join(expected)})"


def in_matmul_dtype(rows: Tensor, z: Tensor | None = None) -> Tensor:
    """``rows`` in the dtype that autocast gives the result of a matmul, which the original uses to look up codes.

    With ``z``, in the wider of that dtype and the dtype of ``z``: the result of an operation on both has the wider one.
    """
    device = rows.device.type
    if not torch.is_autocast_enabled(device):
        return rows
    dtype = torch.get_autocast_dtype(device)
    return rows.to(dtype if z is None else torch.promote_types(dtype, z.dtype))


def _direction(rows: Tensor) -> Tensor:
    rows = rows.detach()
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=-1)


def _nearest_double(x: Tensor, codebook: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, _DOUBLE_PAIRS // codebook.shape[0])
    mode = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(part, codebook, compute_mode=mode).argmin(dim=1) for part in rows.split(step)]
    return torch.cat(parts).reshape(x.shape[:-1])
