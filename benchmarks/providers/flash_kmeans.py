"""flash-kmeans: the assignment step of its k-means, a Triton kernel; float32 goes through TF32 there."""

from torch import Tensor

from benchmarks.providers.provider import Provider


def search(x: Tensor, codebook: Tensor) -> Tensor:
    """The assignment alone, groups as its batch, with the queries' norms it asks for."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    queries = x.transpose(0, 1).contiguous()
    return euclid_assign_triton(queries, codebook, queries.square().sum(-1)).long().T


PROVIDER = Provider(
    "flash-kmeans", "euclid_assign_triton with its own configuration", search, needs="flash_kmeans", runs_on=("cuda",)
)
