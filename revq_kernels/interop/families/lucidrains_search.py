"""The look-up of vector-quantize-pytorch's codebooks: rows of several heads, by distance or by inner product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels import nearest_code
from revq_kernels import segment_sum as summed

_TIE = 1e-8
"""Squared distances up to this one are equal in the package, which clamps them to it."""

_NUMBERS = 1 << 20
"""Numbers held at a time where near codes are compared."""


def assign(x: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """The code that the package's argmax finds for each row of ``x`` ``[h, n, d]`` in ``codes`` ``[h, K, d]``: ``[h, n]``.

    By the largest inner product if ``cosine``, whatever the norms of the codes are, else by the smallest distance, where
    all codes within 1e-4 of a row are equally near; the lowest index among equals.
    """
    x, codes = x.detach(), codes.detach()
    if cosine:
        return _search(F.pad(x, (0, 1)), _lifted(codes))
    indices = _search(x, codes)
    close = (x - rows_of(codes, indices)).square().sum(dim=-1) <= _TIE
    if close.any():
        for head, found in enumerate(indices):
            found[close[head]] = _lowest_tied(x[head, close[head]], codes[head])
    return indices


def rows_of(codes: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``codes`` ``[h, K, d]``, with their gradient: ``[h, n, d]`` for ``indices`` ``[h, n]``."""
    heads, num_codes, dim = codes.shape
    offset = torch.arange(heads, device=codes.device).unsqueeze(1) * num_codes
    return F.embedding(indices + offset, codes.reshape(-1, dim))


def segment_sum(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """The sum of the rows of ``x`` ``[h, n, d]`` that chose each code, in order: float32 ``[h, K, d]``."""
    by_row = x.detach().transpose(0, 1).contiguous(), indices.transpose(0, 1).contiguous()
    return summed(*by_row, num_codes)


def kmeans(codebook: nn.Module, samples: Tensor) -> tuple[Tensor, Tensor]:
    """The package's k-means of ``samples`` ``[h, n, d]`` for one of its codebooks: means ``[h, K, d]``, sizes ``[h, K]``."""
    from vector_quantize_pytorch.vector_quantize_pytorch import batched_bincount, l2norm

    means = codebook.sample_fn(samples, codebook.codebook_size)
    for _ in range(codebook.kmeans_iters):
        buckets = assign(samples, means, codebook.use_cosine_sim)
        sizes = batched_bincount(buckets, minlength=codebook.codebook_size)
        codebook.kmeans_all_reduce_fn(sizes)
        empty = sizes == 0
        updated = segment_sum(samples, buckets, codebook.codebook_size)
        updated = updated / sizes.masked_fill(empty, 1).unsqueeze(-1)
        codebook.kmeans_all_reduce_fn(updated)
        if codebook.use_cosine_sim:
            updated = l2norm(updated)
        means = torch.where(empty.unsqueeze(-1), means, updated)
    return means, sizes


def _search(x: Tensor, codes: Tensor) -> Tensor:
    return nearest_code(x.transpose(0, 1), codes).transpose(0, 1).contiguous()


def _lifted(codes: Tensor) -> Tensor:
    """The codes with one more number, which makes all norms equal: the nearest to (x, 0) has the largest inner product."""
    squares = codes.double().square().sum(dim=-1, keepdim=True)
    largest = squares.nan_to_num(0.0).amax(dim=1, keepdim=True)
    return torch.cat((codes, (largest - squares).clamp(min=0).sqrt().to(codes.dtype)), dim=-1)


def _lowest_tied(x: Tensor, codes: Tensor) -> Tensor:
    """The lowest of the codes ``[K, d]`` that tie for each row of ``x`` ``[m, d]``; at least one does.

    They can only be among those whose first number is as near, which sorting finds.
    """
    keys, order = codes[:, 0].double().sort()
    radius = 1.001 * _TIE**0.5
    start = torch.searchsorted(keys, x[:, 0].double() - radius)
    count = torch.searchsorted(keys, x[:, 0].double() + radius, right=True) - start
    lowest = order.new_full((len(x),), len(codes))
    for part in torch.arange(len(x), device=x.device).split(max(1, _NUMBERS // (int(count.max()) * x.shape[1]))):
        row = part.repeat_interleave(count[part])
        skipped = count[part].cumsum(0) - count[part]  # pairs before each row's
        code = order[torch.arange(len(row), device=x.device) + (start[part] - skipped).repeat_interleave(count[part])]
        ties = (x[row] - codes[code]).square().sum(dim=-1) <= _TIE
        lowest.scatter_reduce_(0, row[ties], code[ties], "amin")
    return lowest
