"""The specification: every operation in plain torch, obvious, on any device.

An index is defined by (docs/design.md, "The exactness contract")::

    D(k)   = ((x_0 - c_k0)^2 + (x_1 - c_k1)^2) + ...   in index order, each operation rounded to float32
    key(k) = (-1 if D(k) is NaN, else the int32 bits of D(k)) << 32 | k
    index  = the low word of the smallest key

The bits of a float that is not negative order as the float does, so the smallest key is the nearest code, the lowest
index among equals, and a NaN before every number.  Each step is an eager torch operation of its own: nothing fuses a
multiplication into an addition, which would change the last bit of D.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

PAIRS_PER_CHUNK = 1 << 20
"""Query-code pairs whose distances are held at a time; bounds the workspace to some tens of megabytes."""

PAIRS_PER_SERIAL_CHUNK = 1 << 14
"""The same where only the calling thread may compute: torch uses one thread for fewer than 2^15 elements."""


def squared_distance(x: Tensor, codes: Tensor) -> Tensor:
    """D of the contract: ``[..., d]`` against ``[..., d]`` (broadcasting) -> float32 ``[...]``."""
    x, codes = x.float(), codes.float()
    difference = x[..., 0] - codes[..., 0]
    total = difference * difference
    for j in range(1, x.shape[-1]):
        difference = x[..., j] - codes[..., j]
        total = total + difference * difference
    return total


def distance_key(distance: Tensor, index: Tensor) -> Tensor:
    """The int64 that orders candidates: NaN first, then the distance, then the index."""
    bits = torch.where(distance.isnan(), -1, distance.view(torch.int32).long())
    return (bits << 32) | index


def inner_product(x: Tensor, codes: Tensor) -> Tensor:
    """x_0 c_k0 + x_1 c_k1 + ... in index order: ``[..., d]`` against ``[..., d]`` (broadcasting) -> float32 ``[...]``."""
    x, codes = x.float(), codes.float()
    total = x[..., 0] * codes[..., 0]
    for j in range(1, x.shape[-1]):
        total = total + x[..., j] * codes[..., j]
    return total


def weighted_distance(x: Tensor, weight: Tensor, codes: Tensor) -> Tensor:
    """w_0 (x_0 - c_k0)^2 + ... in index order, the square rounded before the weight: float32 ``[...]``."""
    x, weight, codes = x.float(), weight.float(), codes.float()
    difference = x[..., 0] - codes[..., 0]
    total = weight[..., 0] * (difference * difference)
    for j in range(1, x.shape[-1]):
        difference = x[..., j] - codes[..., j]
        total = total + weight[..., j] * (difference * difference)
    return total


def signed_key(value: Tensor, index: Tensor) -> Tensor:
    """As `distance_key` for values of either sign; the two zeros are equal."""
    bits = (value + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
    bits = torch.where(
        bits < 0, bits ^ 0x7FFFFFFF, bits
    )  # the bits of a negative float decrease as its value increases
    return (torch.where(value.isnan(), -(2**31), bits) << 32) | index


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """x ``[..., G, d]``, codebook ``[G, K, d]`` -> indices int64 ``[..., G]``."""
    return _smallest_key(x, codebook, None, lambda x, _, codes, index: distance_key(squared_distance(x, codes), index))


@torch.no_grad()
def nearest_by_metric(x: Tensor, codebook: Tensor, weight: Tensor | None, metric: str) -> Tensor:
    """As `nearest_code` by another metric: the largest "inner_product", or the smallest "diagonal" weighted distance."""
    if metric == "inner_product":
        return _smallest_key(x, codebook, None, lambda x, _, codes, index: signed_key(-inner_product(x, codes), index))
    return _smallest_key(x, codebook, weight, lambda *args: signed_key(weighted_distance(*args[:3]), args[3]))


Key = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
"""(queries ``[n, 1, d]``, their weights or None, codes ``[1, k, d]``, index ``[k]``) -> int64 ``[n, k]``."""


def _smallest_key(x: Tensor, codebook: Tensor, weight: Tensor | None, key: Key) -> Tensor:
    """The search: the low word of each query's smallest key, in chunks of pairs."""
    num_groups, num_codes, code_dim = codebook.shape
    queries = x.reshape(-1, num_groups, code_dim)
    weights = None if weight is None else weight.reshape(-1, num_groups, code_dim)
    indices = torch.empty(queries.shape[:2], dtype=torch.int64, device=x.device)
    with denormals_kept() as flushed:
        # torch's other threads may still flush denormals when the calling thread no longer does
        pairs = PAIRS_PER_SERIAL_CHUNK if flushed else PAIRS_PER_CHUNK
        codes_per_chunk = min(num_codes, pairs)
        rows_per_chunk = max(1, pairs // codes_per_chunk)
        for group in range(num_groups):
            for start in range(0, queries.shape[0], rows_per_chunk):
                rows = slice(start, start + rows_per_chunk)
                weighed = None if weights is None else weights[rows, group][:, None]
                of_codes = partial(key, queries[rows, group][:, None], weighed)
                indices[rows, group] = _smallest_in_group(of_codes, codebook[group], codes_per_chunk)
    return indices.reshape(x.shape[:-1])


def _smallest_in_group(key: Callable[[Tensor, Tensor], Tensor], codes: Tensor, codes_per_chunk: int) -> Tensor:
    """key of (codes ``[1, k, d]``, index ``[k]``), codes ``[K, d]`` -> indices ``[n]``."""
    best: Tensor | None = None
    for first in range(0, codes.shape[0], codes_per_chunk):
        chunk = codes[first : first + codes_per_chunk]
        smallest = key(chunk[None], torch.arange(first, first + chunk.shape[0], device=codes.device)).amin(dim=1)
        best = smallest if best is None else torch.minimum(best, smallest)
    assert best is not None  # K >= 1 is checked at the public functions
    return best & 0xFFFFFFFF


@torch.no_grad()
def gather_codes(codebook: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """codebook ``[G, K, d]``, indices ``[..., G]`` -> the rows at these indices ``[..., G, d]`` in ``dtype``."""
    group = torch.arange(codebook.shape[0], device=codebook.device)
    return codebook[group, indices].to(dtype)


@torch.no_grad()
def count_codes_(count: Tensor, indices: Tensor) -> None:
    """Add to count int64 ``[G, K]`` how often each code occurs in indices ``[..., G]``."""
    by_group = indices.reshape(-1, count.shape[0]).T
    # in a tensor of its own, so that an index out of range leaves count unchanged
    count += torch.zeros_like(count).scatter_add_(1, by_group, torch.ones_like(by_group))


@torch.no_grad()
def quantize(x: Tensor, codebook: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """The search, the gather and the count: (quantized ``[..., G, d]`` in x's dtype, indices ``[..., G]``)."""
    indices = nearest_code(x, codebook)
    if count is not None:
        count_codes_(count, indices)
    return gather_codes(codebook, indices, x.dtype), indices


@torch.no_grad()
def segment_sum(values: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Sum the rows of values ``[..., G, d]`` that have the same index -> float32 ``[G, K, d]``.

    The sum runs over queries in order, one row at a time, in float32.
    """
    num_groups, code_dim = values.shape[-2:]
    rows = (indices.reshape(-1, num_groups) + torch.arange(num_groups, device=indices.device) * num_codes).reshape(-1)
    total = torch.zeros(num_groups * num_codes, code_dim, dtype=torch.float32, device=values.device)
    with denormals_kept():
        total.index_add_(0, rows, values.reshape(-1, code_dim).float())
    return total.view(num_groups, num_codes, code_dim)


@contextmanager
def denormals_kept() -> Iterator[bool]:
    """Switch flush-to-zero off for a block, and back on afterwards if it was on.

    Yields whether it was on, which a product of small floats shows: torch has a setter for the mode but no getter.
    """
    flushed = bool((torch.tensor(1e-38, dtype=torch.float32, device="cpu") * 0.01) == 0)
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield flushed
    finally:
        if flushed:
            torch.set_flush_denormal(True)
