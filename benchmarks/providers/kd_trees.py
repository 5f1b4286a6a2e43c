"""kd-trees: built once per codebook, then queried."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.providers.provider import Provider


def build_scipy(codebook: Tensor) -> list[Any]:
    """Balanced, compact trees: the defaults, which scipy's docs name best for queries."""
    from scipy.spatial import cKDTree

    return [cKDTree(codes) for codes in codebook.numpy()]


def query_scipy(x: Tensor, trees: list[Any]) -> Tensor:
    """All threads of torch's setting."""
    workers = torch.get_num_threads()
    return _columns([tree.query(x[:, g].numpy(), workers=workers)[1] for g, tree in enumerate(trees)])


def build_nanoflann(codebook: Tensor) -> list[Any]:
    """Leaves of ten codes: what nanoflann's docs recommend for queries."""
    from pynanoflann import KDTree

    trees = [KDTree(n_neighbors=1, leaf_size=10, metric="l2") for _ in codebook]
    for tree, codes in zip(trees, codebook.numpy(), strict=True):
        tree.fit(codes)
    return trees


def query_nanoflann(x: Tensor, trees: list[Any]) -> Tensor:
    """All threads of torch's setting."""
    jobs, queries = torch.get_num_threads(), x.transpose(0, 1).contiguous().numpy()
    return _columns([tree.kneighbors(queries[g], n_jobs=jobs)[1][:, 0] for g, tree in enumerate(trees)])


def _columns(columns: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int64))


LARGEST_DIM = 16
"""scipy's docs: beyond some 20 dimensions a kd-tree is no faster than brute force."""

PROVIDERS = (
    Provider(
        "scipy cKDTree",
        "balanced and compact, workers = threads",
        query_scipy,
        prepare=build_scipy,
        needs="scipy",
        max_code_dim=LARGEST_DIM,
    ),
    Provider(
        "nanoflann",
        "leaf size 10, jobs = threads",
        query_nanoflann,
        prepare=build_nanoflann,
        needs="pynanoflann",
        max_code_dim=LARGEST_DIM,
    ),
)
