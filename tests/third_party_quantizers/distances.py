"""The distance matrix that most of the re-stated quantizers build: squared norms on both sides less twice the products."""

import torch
from torch import Tensor


def squared_distances(z: Tensor, codes: Tensor) -> Tensor:
    """All ``[N, K]`` of them, from ``[N, d]`` and ``[K, d]``, in the dtype that autocast gives the product."""
    norms = torch.sum(z**2, dim=1, keepdim=True) + torch.sum(codes**2, dim=1)
    return norms - 2 * torch.einsum("nd,dk->nk", z, codes.t())
