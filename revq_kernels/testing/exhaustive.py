"""The nearest code by exhaustive search in plain torch, on any device: the truth that other searches are compared with.

The code is independent of the reference implementation and takes another form: the smallest distance of a chunk of
codes, then the first code that has it.  Each step is an eager operation of its own, so that no compiler fuses a product
into a sum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PAIRS_PER_CHUNK = {"cuda": 1 << 26, "cpu": 1 << 18}
"""Most distances that exist at one time, per device type: a few hundred megabytes on a GPU, cache-sized on a CPU."""


class Nearest(NamedTuple):
    """Smallest squared distance, and the lowest index of a code that has it, both ``[N, G]``."""

    distance: Tensor
    index: Tensor


def squared_distance(x: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Squares of the differences, summed over the last dimension in index order; a NaN becomes -1, so it sorts first."""
    total = (x[..., 0].to(dtype) - codes[..., 0].to(dtype)).square_()
    for j in range(1, x.shape[-1]):
        total += (x[..., j].to(dtype) - codes[..., j].to(dtype)).square_()
    return total.masked_fill_(total.isnan(), -1)


@torch.no_grad()
def exhaustive_search(x: Tensor, codebook: Tensor, dtype: torch.dtype = torch.float32) -> Nearest:
    """Search x ``[N, G, d]`` in codebook ``[G, K, d]`` with distances of ``dtype``; float32 gives the contract's index."""
    (num_groups, num_codes, _), num_queries = codebook.shape, x.shape[0]
    pairs = PAIRS_PER_CHUNK.get(x.device.type, 1 << 20)
    codes_at_once = min(num_codes, pairs)
    rows_at_once = max(1, min(num_queries, pairs // codes_at_once))
    groups_at_once = max(1, min(num_groups, pairs // (codes_at_once * rows_at_once)))
    distance = torch.empty(num_groups, num_queries, dtype=dtype, device=x.device)
    index = torch.empty(num_groups, num_queries, dtype=torch.int64, device=x.device)
    for g in range(0, num_groups, groups_at_once):
        groups = slice(g, g + groups_at_once)
        for n in range(0, num_queries, rows_at_once):
            rows = slice(n, n + rows_at_once)
            queries = x[rows, groups].transpose(0, 1).contiguous()
            found = _nearest(queries, codebook[groups], codes_at_once, dtype)
            distance[groups, rows], index[groups, rows] = found
    return Nearest(distance.T, index.T)


def _nearest(queries: Tensor, codes: Tensor, codes_at_once: int, dtype: torch.dtype) -> Nearest:
    """queries ``[g, n, d]``, codes ``[g, K, d]`` -> ``[g, n]``."""
    best: Nearest | None = None
    for first in range(0, codes.shape[1], codes_at_once):
        chunk = codes[:, first : first + codes_at_once]
        distance = squared_distance(queries[:, :, None], chunk[:, None], dtype)
        smallest = distance.amin(-1)
        index_in_chunk = torch.arange(chunk.shape[1], dtype=torch.int32, device=codes.device)
        beyond = torch.tensor(chunk.shape[1], dtype=torch.int32, device=codes.device)
        index = torch.where(distance == smallest[..., None], index_in_chunk, beyond).amin(-1).long() + first
        if best is None:
            best = Nearest(smallest, index)
        else:
            nearer = smallest < best.distance
            best = Nearest(torch.where(nearer, smallest, best.distance), torch.where(nearer, index, best.index))
    assert best is not None  # K >= 1
    return best
