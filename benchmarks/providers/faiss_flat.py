"""faiss-cpu, exhaustive."""

import torch
from torch import Tensor

from benchmarks.providers.provider import Provider

BLAS_THRESHOLD = 20
"""faiss runs its fused kernel when N * d reaches this; its default, 128,000, leaves a group's few queries to the slow
one-by-one path."""


def search(x: Tensor, codebook: Tensor) -> Tensor:
    """One faiss.knn per group."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
    faiss.omp_set_num_threads(torch.get_num_threads())
    columns = []
    for queries, codes in zip(x.transpose(0, 1).contiguous().numpy(), codebook.numpy(), strict=True):
        columns.append(torch.from_numpy(faiss.knn(queries, codes, 1)[1]))
    return torch.cat(columns, dim=1)


PROVIDER = Provider(
    "faiss", "faiss.knn, distance_compute_blas_threshold = 20 (its fused kernel)", search, needs="faiss"
)
