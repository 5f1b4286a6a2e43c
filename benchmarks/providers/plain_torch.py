"""Searches in torch alone: the released code's, a chunked expansion, and two forms under torch.compile."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.providers.provider import Provider

SCORES_AT_ONCE = {"cuda": 1 << 28, "cpu": 1 << 24}
"""Scores of the chunked expansion that exist at one time, per device type; a GPU needs more of them for occupancy."""

LARGEST_DIRECT = 32


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    """torch.cdist and a minimum, two groups at a time, as the released ReVQ code does."""

    def one(queries: Tensor, codes: Tensor) -> Tensor:
        return torch.cdist(queries, codes).min(dim=-1).indices

    return torch.vmap(one, chunk_size=2)(x.transpose(0, 1), codebook).T


def expansion_chunked(x: Tensor, codebook: Tensor) -> Tensor:
    """|c|^2 - 2 x.c with a running minimum over chunks of codes."""
    queries = x.transpose(0, 1)
    (num_groups, num_codes, _), num_queries = codebook.shape, x.shape[0]
    best = torch.full((num_groups, num_queries), torch.inf, device=x.device)
    indices = torch.zeros(num_groups, num_queries, dtype=torch.int64, device=x.device)
    scores_at_once = SCORES_AT_ONCE.get(x.device.type, 1 << 24)
    step = max(64, min(8192, scores_at_once // (num_groups * num_queries)))
    for first in range(0, num_codes, step):
        codes = codebook[:, first : first + step]
        scores = torch.baddbmm(codes.square().sum(-1)[:, None], queries, codes.transpose(1, 2), alpha=-2)
        value, index = scores.min(dim=-1)
        nearer = value < best
        best = torch.where(nearer, value, best)
        indices = torch.where(nearer, index + first, indices)
    return indices.T


def expansion(x: Tensor, codebook: Tensor) -> Tensor:
    """The expansion in one expression, for torch.compile: the product stays a library call, the rest is fused."""
    norms = codebook.square().sum(-1)[:, None]
    return torch.baddbmm(norms, x.transpose(0, 1), codebook.transpose(1, 2), alpha=-2).argmin(-1).T


def direct(x: Tensor, codebook: Tensor) -> Tensor:
    """The sum over d unrolled, for torch.compile: distances and minimum become one kernel without a distance matrix."""
    queries = x.transpose(0, 1)[:, :, None]
    total = (queries[..., 0] - codebook[:, None, :, 0]).square()
    for j in range(1, x.shape[-1]):
        total = total + (queries[..., j] - codebook[:, None, :, j]).square()
    return total.argmin(-1).T


def compiled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Compile at the first call, one program per shape."""

    @functools.cache
    def program() -> Callable[[Tensor, Tensor], Tensor]:
        torch._dynamo.config.cache_size_limit = 64  # the default is below the number of cases
        return torch.compile(function, dynamic=False, fullgraph=True)

    return lambda x, codebook: program()(x, codebook)


BOTH = ("cpu", "cuda")

PROVIDERS = (
    Provider("torch.cdist", "torch.vmap(cdist and min, chunk_size=2), as the released code does", cdist, runs_on=BOTH),
    Provider("addmm, chunked", "baddbmm over up to 8,192 codes at a time", expansion_chunked, runs_on=BOTH),
    Provider(
        "torch.compile, direct",
        "sum over d unrolled, static shapes; d up to 32",
        compiled(direct),
        runs_on=BOTH,
        max_code_dim=LARGEST_DIRECT,
        slow_start=True,
    ),
    Provider(
        "torch.compile, expansion",
        "baddbmm and argmin, static shapes",
        compiled(expansion),
        runs_on=BOTH,
        slow_start=True,
    ),
)
