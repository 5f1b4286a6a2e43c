"""Everything that is measured: x ``[N, G, d]``, codebook ``[G, K, d]`` -> indices ``[N, G]``."""

from collections.abc import Callable

import torch
from torch import Tensor

from revq_kernels import nearest_code

OURS = ("revq",)


def revq(x: Tensor, codebook: Tensor) -> Tensor:
    """This library."""
    return nearest_code(x, codebook)


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    """torch.cdist and a minimum, two groups at a time, as the released ReVQ code calls it."""

    def one(queries: Tensor, codes: Tensor) -> Tensor:
        return torch.cdist(queries, codes).min(dim=-1).indices

    return torch.vmap(one, chunk_size=2)(x.transpose(0, 1), codebook).T


def addmm_chunked(x: Tensor, codebook: Tensor) -> Tensor:
    """The expansion |c|^2 - 2 x.c with a running minimum over chunks of codes: at most 2^24 scores exist at a time."""
    queries = x.transpose(0, 1)
    best = torch.full(queries.shape[:2], torch.inf)
    indices = torch.zeros(queries.shape[:2], dtype=torch.int64)
    step = max(64, min(8192, 2**24 // (queries.shape[0] * queries.shape[1])))
    for first in range(0, codebook.shape[1], step):
        codes = codebook[:, first : first + step]
        scores = torch.baddbmm(codes.square().sum(-1)[:, None], queries, codes.transpose(1, 2), alpha=-2)
        value, index = scores.min(dim=-1)
        nearer = value < best
        best = torch.where(nearer, value, best)
        indices = torch.where(nearer, index + first, indices)
    return indices.T


PROVIDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "revq": revq,
    "torch.cdist": cdist,
    "addmm, chunked": addmm_chunked,
}
