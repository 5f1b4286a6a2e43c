"""vector-quantize-pytorch: the quantizer module in evaluation mode."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.providers.provider import Provider


def build(codebook: Tensor) -> Any:
    """One module whose heads are the groups, holding the given codes."""
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
def search(x: Tensor, module: Any) -> Tensor:
    """Its forward pass, which has no entry for the search alone."""
    return module(x.reshape(1, x.shape[0], -1))[1].reshape(x.shape[:2])


PROVIDER = Provider(
    "vector-quantize-pytorch",
    "evaluation mode, groups as heads",
    search,
    prepare=build,
    needs="vector_quantize_pytorch",
    runs_on=("cpu", "cuda"),
)
