"""Problem sizes and data, shared by every benchmark."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One search: N queries in each of G groups, against K codes of d numbers."""

    name: str
    N: int
    G: int
    K: int
    d: int
    offset: float = 0.0

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Standard normal x ``[N, G, d]`` and codebook ``[G, K, d]``, both shifted by the offset."""
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(self.N, self.G, self.d, generator=generator) + self.offset,
            torch.randn(self.G, self.K, self.d, generator=generator) + self.offset,
        )


# The paper's configurations with G scaled to what a CPU finishes in a moment (the paper: 512, 256, 256).
SEARCH = [
    Case("512T", 256, 8, 16384, 4),
    Case("256T", 256, 2, 65536, 8),
    Case("256T-L", 128, 1, 262144, 8),
    Case("512T, offset", 256, 8, 16384, 4, offset=100.0),
    Case("tokenizer-d16", 4096, 1, 16384, 16),
    Case("tokenizer-d64", 2048, 1, 16384, 64),
    Case("tokenizer-d256", 2048, 1, 8192, 256),
]

MEMORY = [Case("memory", 65536, 1, 16384, 8)]
