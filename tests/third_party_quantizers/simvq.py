"""youngsheen/SimVQ, taming/modules/vqvae/quantize.py: SimVQ and SimVQ1D."""

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.third_party_quantizers.distances import squared_distances
from tests.third_party_quantizers.taming import Remapping

LossBreakdown = namedtuple("LossBreakdown", ["per_sample_entropy", "codebook_entropy", "commitment", "avg_probs"])


class SimVQ(Remapping):
    """A frozen table, transformed by a learned linear map.

    As in the repository, the zeros among its results stay on the CPU and ``get_codebook_entry`` omits the map.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: Tensor | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        nn.init.normal_(self.embedding.weight, std=e_dim**-0.5)
        self.embedding.requires_grad_(False)
        self.embedding_proj = nn.Linear(e_dim, e_dim)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[tuple[Tensor, Tensor, Tensor], LossBreakdown]:
        """z ``[B, C, ...]`` -> (quantized, 0, indices), losses, one of which is not 0."""
        assert temp in (None, 1.0) and not rescale_logits and not return_logits, "for quantizers of another kind"
        z = z.movedim(1, -1).contiguous()
        assert z.shape[-1] == self.e_dim
        codes = self.embedding_proj(self.embedding.weight)
        indices = squared_distances(z.view(-1, self.e_dim), codes).argmin(dim=1)
        rows = F.embedding(indices, codes).view(z.shape)
        quantized = (z + (rows - z).detach()).movedim(-1, 1).contiguous()
        zeros = [torch.tensor(0.0) for _ in range(4)]
        breakdown = LossBreakdown(zeros[1], zeros[2], self.loss(z, rows), zeros[3])
        return (quantized, zeros[0], self.arranged(indices, quantized)), breakdown


class SimVQ1D(SimVQ):
    """The same for ``[B, C, L]``; with ``sane_index_shape`` it fails, as in the repository."""

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[tuple[Tensor, Tensor, Tensor], LossBreakdown]:
        """z ``[B, C, ...]`` -> (quantized, 0, indices), losses, one of which is not 0."""
        assert z.dim() == 3
        return super().forward(z, temp, rescale_logits, return_logits)
