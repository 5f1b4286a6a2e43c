"""The search as other people's quantizers need it: rows against one codebook, in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from revq_kernels import count_codes_, nearest_code

_DOUBLE_PAIRS = 1 << 22
"""Distances held at a time in float64, which has no kernel."""


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The contract's index of each row of ``x`` ``[..., d]`` among ``codebook`` ``[K, d]``: int64 ``[...]``.

    Neither gradients nor autocast reach it: bfloat16 and float16 are read exactly, whatever the rest of the model runs in.
    float64, for which there is no kernel, is compared in float64, a few rows at a time.
    """
    if torch.float64 in (x.dtype, codebook.dtype):
        return _nearest_double(x.detach().double(), codebook.detach().double())
    return nearest_code(x.unsqueeze(-2), codebook.unsqueeze(0)).squeeze(-1)


def nearest_normalized(x: Tensor, codebook: Tensor) -> Tensor:
    """`nearest` among directions: each row of both is scaled to length 1 first, as ``torch.nn.functional.normalize`` does.

    In float32 at least, since directions that are rounded to bfloat16 or float16 have other neighbors.
    """
    return nearest(_direction(x), _direction(codebook))


def most_aligned(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the unit vector in ``codebook`` with the largest inner product; 0 for a row of zeros, as argmax gives."""
    return nearest(x, codebook).masked_fill((x == 0).all(-1), 0)


def has_zero_code(codebook: Tensor) -> bool:
    """Whether normalizing ``codebook`` leaves a row of zeros, whose distance says nothing of its inner product."""
    return not codebook.is_meta and bool((codebook.detach() == 0).all(-1).any())


def count_choices(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code stands in ``indices``, int64 ``[num_codes]``: bincount without its break of the graph."""
    count = torch.zeros(1, num_codes, dtype=torch.int64, device=indices.device)
    return count_codes_(count, indices.unsqueeze(-1)).squeeze(0)


def _direction(rows: Tensor) -> Tensor:
    rows = rows.detach()
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=-1)


def _nearest_double(x: Tensor, codebook: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, _DOUBLE_PAIRS // codebook.shape[0])
    mode = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(part, codebook, compute_mode=mode).argmin(dim=1) for part in rows.split(step)]
    return torch.cat(parts).reshape(x.shape[:-1])
