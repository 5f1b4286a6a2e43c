"""SNAC's ``VectorQuantize`` (``snac/vq.py``), restated: separate because DAC's class has the same name.

It is DAC's stage at a lower rate and without losses.

Left out: its residual module.
"""

import torch.nn.functional as F
from torch import Tensor

from tests.third_party_quantizers import dac


class VectorQuantize(dac.VectorQuantize):
    """One stage for every ``stride`` frames together."""

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int, stride: int = 1) -> None:
        super().__init__(input_dim, codebook_size, codebook_dim)
        self.stride = stride

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z ``[B, C, T]`` -> quantized ``[B, C, T]`` and indices ``[B, T / stride]``."""
        z_q, _, _, indices, _ = super().forward(F.avg_pool1d(z, self.stride) if self.stride > 1 else z)
        return z_q.repeat_interleave(self.stride, dim=-1), indices
