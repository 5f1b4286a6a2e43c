"""LlamaGen's quantizer (FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py), restated.

Kept: the constructor, names of attributes and state, what is returned in which mode, the entropy term that is computed in
training whatever its ratio, and the record of used codes, which is a *parameter* that is registered as a buffer: a training
step on the CPU therefore raises, and on a GPU the buffer is no leaf, so that the module cannot be copied.  Left out: nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VectorQuantizer(nn.Module):
    """``[B, e_dim, H, W]`` -> (quantized, four losses and usages, (None, None, indices ``[B H W]``))."""

    def __init__(
        self, n_e: int, e_dim: int, beta: float, entropy_loss_ratio: float, l2_norm: bool, show_usage: bool
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.entropy_loss_ratio, self.l2_norm, self.show_usage = entropy_loss_ratio, l2_norm, show_usage
        table = torch.empty(n_e, e_dim).uniform_(-1 / n_e, 1 / n_e)
        self.embedding = nn.Embedding(n_e, e_dim, _weight=F.normalize(table, dim=-1) if l2_norm else table)
        if show_usage:
            self.register_buffer("codebook_used", nn.Parameter(torch.zeros(65536)))

    def forward(self, z: Tensor) -> tuple:
        """Nearest codes; losses in training only."""
        z = z.permute(0, 2, 3, 1).contiguous()
        rows, codes = z.reshape(-1, self.e_dim), self._codes()
        if self.l2_norm:
            z, rows = F.normalize(z, dim=-1), F.normalize(rows, dim=-1)
        distances = rows.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * (rows @ codes.t())
        indices = distances.argmin(1)
        quantized = codes[indices].view(z.shape)
        usage, losses = 0, (None, None, None)
        if self.training:
            if self.show_usage:
                new = len(indices)
                self.codebook_used[:-new] = self.codebook_used[new:].clone()
                self.codebook_used[-new:] = indices
                usage = len(self.codebook_used.unique()) / self.n_e
            losses = (
                (quantized - z.detach()).pow(2).mean(),
                self.beta * (quantized.detach() - z).pow(2).mean(),
                self.entropy_loss_ratio * _entropy_loss(-distances),
            )
        through = z + (quantized - z).detach()
        return through.permute(0, 3, 1, 2), (*losses, usage), (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple | None = None, channel_first: bool = True) -> Tensor:
        """The codes of ``indices``; ``shape`` is that of the result."""
        entries = self._codes()[indices]
        if shape is None:
            return entries
        if not channel_first:
            return entries.view(shape)
        batch, channels, height, width = shape
        return entries.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()

    def _codes(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1) if self.l2_norm else self.embedding.weight


def _entropy_loss(affinity: Tensor, temperature: float = 0.01) -> Tensor:
    affinity = affinity / temperature
    probability = affinity.softmax(-1)
    of_samples = -(probability * (affinity + 1e-5).log_softmax(-1)).sum(-1).mean()
    mean = probability.mean(0)
    return of_samples + (mean * (mean + 1e-5).log()).sum()
