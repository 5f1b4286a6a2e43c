"""Searches of other libraries, tuned as their docs advise; each library is imported by its first call.

Where a library prepares something for a codebook (a tree or a module), ``build_*`` makes it, one call per codebook, and
the search takes it in place of the codebook.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.providers.provider import Provider

FAISS_BLAS_THRESHOLD = 20
"""The value given to faiss, whose default is 128,000.  If N * d of a call is below the threshold, faiss handles one
query at a time, which is slow; otherwise it runs its fused kernel.  Calls here hold one group and often are below the
default."""

LARGEST_TREE_DIM = 16
"""The largest d for which the trees of scipy and nanoflann are measured.  scipy's docs say that a kd-tree is no faster
than brute force in about 20 dimensions or more; 16 is the next power of two below that."""


def faiss(x: Tensor, codebook: Tensor) -> Tensor:
    """One faiss.knn per group."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = FAISS_BLAS_THRESHOLD
    faiss.omp_set_num_threads(torch.get_num_threads())
    columns = []
    for queries, codes in zip(x.transpose(0, 1).contiguous().numpy(), codebook.numpy(), strict=True):
        columns.append(torch.from_numpy(faiss.knn(queries, codes, 1)[1]))
    return torch.cat(columns, dim=1)


def build_scipy(codebook: Tensor) -> list[Any]:
    """Balanced, compact trees: the defaults, which scipy's docs call best for queries."""
    from scipy.spatial import cKDTree

    return [cKDTree(codes) for codes in codebook.numpy()]


def query_scipy(x: Tensor, trees: list[Any]) -> Tensor:
    """Query the trees with as many workers as torch has threads."""
    workers = torch.get_num_threads()
    return _stacked([tree.query(x[:, g].numpy(), workers=workers)[1] for g, tree in enumerate(trees)])


def build_nanoflann(codebook: Tensor) -> list[Any]:
    """Leaves of ten codes, which nanoflann's docs recommend for queries."""
    from pynanoflann import KDTree

    trees = [KDTree(n_neighbors=1, leaf_size=10, metric="l2") for _ in codebook]
    for tree, codes in zip(trees, codebook.numpy(), strict=True):
        tree.fit(codes)
    return trees


def query_nanoflann(x: Tensor, trees: list[Any]) -> Tensor:
    """Query the trees with as many jobs as torch has threads."""
    jobs, queries = torch.get_num_threads(), x.transpose(0, 1).contiguous().numpy()
    return _stacked([tree.kneighbors(queries[g], n_jobs=jobs)[1][:, 0] for g, tree in enumerate(trees)])


def scikit_learn(x: Tensor, codebook: Tensor) -> Tensor:
    """pairwise_distances_argmin per group, which converts float32 to float64 chunk by chunk."""
    import sklearn
    from sklearn.metrics import pairwise_distances_argmin

    queries = x.transpose(0, 1).contiguous().numpy()
    with sklearn.config_context(assume_finite=True):
        return _stacked([pairwise_distances_argmin(q, c) for q, c in zip(queries, codebook.numpy(), strict=True)])


def keops(x: Tensor, codebook: Tensor) -> Tensor:
    """argmin of a lazy sum of squares, with the groups as its batch dimension; compiles one program per d."""
    from pykeops.torch import LazyTensor

    queries = LazyTensor(x.transpose(0, 1).contiguous()[:, :, None])
    codes = LazyTensor(codebook[:, None])
    return ((queries - codes) ** 2).sum(-1).argmin(dim=2).squeeze(-1).T


def flash_kmeans(x: Tensor, codebook: Tensor) -> Tensor:
    """The assignment step of its k-means, groups as its batch dimension; the Triton kernel uses TF32 for float32."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    queries = x.transpose(0, 1).contiguous()
    return euclid_assign_triton(queries, codebook, queries.square().sum(-1)).long().T


def build_vector_quantize(codebook: Tensor) -> Any:
    """One module of vector-quantize-pytorch whose heads are the groups, with the given codes."""
    from vector_quantize_pytorch import VectorQuantize

    groups, num_codes, code_dim = codebook.shape
    module = VectorQuantize(
        dim=groups * code_dim,
        codebook_size=num_codes,
        codebook_dim=code_dim,
        heads=groups,
        separate_codebook_per_head=True,
    )
    module = module.to(codebook.device).eval()
    module.codebook = codebook if groups > 1 else codebook[0]
    return module


@torch.no_grad()
def vector_quantize(x: Tensor, module: Any) -> Tensor:
    """The module's forward pass: it has no function for the search alone."""
    return module(x.reshape(1, x.shape[0], -1))[1].reshape(x.shape[:2])


def _stacked(columns: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int64))


PROVIDERS = (
    Provider("faiss", "faiss.knn, distance_compute_blas_threshold = 20 (its fused kernel)", faiss, needs="faiss"),
    Provider(
        "scipy cKDTree",
        "balanced and compact, workers = threads",
        query_scipy,
        prepare=build_scipy,
        needs="scipy",
        max_code_dim=LARGEST_TREE_DIM,
    ),
    Provider(
        "nanoflann",
        "leaf size 10, jobs = threads",
        query_nanoflann,
        prepare=build_nanoflann,
        needs="pynanoflann",
        max_code_dim=LARGEST_TREE_DIM,
    ),
    Provider("scikit-learn", "pairwise_distances_argmin, inputs not scanned for NaN", scikit_learn, needs="sklearn"),
    Provider(
        "KeOps",
        "LazyTensor argmin, groups as batch",
        keops,
        needs="pykeops",
        runs_on=("cpu", "cuda"),
        capturable=False,
        slow_start=True,
    ),
    Provider(
        "flash-kmeans",
        "euclid_assign_triton with its own configuration",
        flash_kmeans,
        needs="flash_kmeans",
        runs_on=("cuda",),
    ),
    Provider(
        "vector-quantize-pytorch",
        "evaluation mode, groups as heads",
        vector_quantize,
        prepare=build_vector_quantize,
        needs="vector_quantize_pytorch",
        runs_on=("cpu", "cuda"),
    ),
)
