"""The expanded distance matrix |z|^2 + |c|^2 - 2 z.c: separate because most of the restated quantizers build it."""

import torch
from torch import Tensor


def squared_distances(z: Tensor, codes: Tensor) -> Tensor:
    """Distances ``[N, K]`` from ``[N, d]`` and ``[K, d]``, in the dtype that autocast gives the product."""
    norms = torch.sum(z**2, dim=1, keepdim=True) + torch.sum(codes**2, dim=1)
    return norms - 2 * torch.einsum("nd,dk->nk", z, codes.t())
