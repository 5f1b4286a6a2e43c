"""The MLP rectifier of the paper's Table 4."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class LatentMLP(nn.Module):
    """A residual MLP on the flattened latent: ``[B, C, h, w]`` -> ``[B, C, h, w]``.

    Normalizes within a sample (RMSNorm), not over the batch, so that the same tokens give the same picture in any batch.

    Args:
        latent_shape: (C, h, w).
        width: hidden features.
        layers: residual blocks.
    """

    def __init__(self, latent_shape: tuple[int, int, int], width: int, layers: int) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        self.latent_shape = tuple(latent_shape)
        self.conv_in = nn.Linear(size, width)  # named as in the other rectifiers
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(layers)))
        self.norm_out = nn.RMSNorm(width, eps=1e-5)
        self.conv_out = nn.Linear(width, size)

    def forward(self, latents: Tensor) -> Tensor:
        """Map normalized latents ``[B, C, h, w]``."""
        hidden = self.blocks(self.conv_in(latents.flatten(1)))
        return self.conv_out(F.silu(self.norm_out(hidden))).unflatten(1, self.latent_shape)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))
