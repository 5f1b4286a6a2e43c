"""bytedance/1d-tokenizer, modeling/quantizer/quantizer.py: TiTok's VectorQuantizer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.third_party_quantizers.distances import squared_distances


class VectorQuantizer(nn.Module):
    """With ``clustering_vq``, training moves rarely used codes towards the nearest sample of each (CVQ-VAE).

    Gathering the distances of several processes is left out.
    """

    def __init__(
        self,
        codebook_size: int = 1024,
        token_size: int = 256,
        commitment_cost: float = 0.25,
        use_l2_norm: bool = False,
        clustering_vq: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_size, self.token_size, self.commitment_cost = codebook_size, token_size, commitment_cost
        self.embedding = nn.Embedding(codebook_size, token_size)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.use_l2_norm, self.clustering_vq = use_l2_norm, clustering_vq
        if clustering_vq:
            self.decay = 0.99
            self.register_buffer("embed_prob", torch.zeros(codebook_size))

    @torch.autocast("cuda", enabled=False)
    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z ``[B, C, H, W]`` -> quantized of that shape, losses and indices ``[B, H, W]``."""
        z = z.float().permute(0, 2, 3, 1).contiguous()
        samples, codes = z.view(-1, self.token_size), self.embedding.weight
        if self.use_l2_norm:
            distances = squared_distances(F.normalize(samples, dim=-1), F.normalize(codes, dim=-1))
        else:
            distances = squared_distances(samples, codes)
        indices = distances.argmin(dim=1)
        rows = self.get_codebook_entry(indices).view(z.shape)
        if self.use_l2_norm:
            rows, z = F.normalize(rows, dim=-1), F.normalize(z, dim=-1)
        commitment = self.commitment_cost * torch.mean((rows.detach() - z) ** 2)
        codebook = torch.mean((rows - z.detach()) ** 2)
        if self.clustering_vq and self.training:
            self._cluster(samples.detach(), distances.detach(), indices)
        quantized = (z + (rows - z).detach()).permute(0, 3, 1, 2).contiguous()
        results = {
            "quantizer_loss": commitment + codebook,
            "commitment_loss": commitment,
            "codebook_loss": codebook,
            "min_encoding_indices": indices.view(z.shape[:-1]),
        }
        return quantized, results

    @torch.no_grad()
    def _cluster(self, samples: Tensor, distances: Tensor, indices: Tensor) -> None:
        one_hot = torch.zeros(len(samples), self.codebook_size, device=samples.device)
        one_hot.scatter_(1, indices.unsqueeze(1), 1)
        self.embed_prob.mul_(self.decay).add_(one_hot.mean(dim=0), alpha=1 - self.decay)
        share = torch.exp(-(self.embed_prob * self.codebook_size * 10) / (1 - self.decay) - 1e-3)
        share = share.unsqueeze(1).repeat(1, self.token_size)
        closest = samples[distances.argmin(dim=0)]
        self.embedding.weight.data = self.embedding.weight.data * (1 - share) + closest * share

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """Codes by index ``[N]``, or mixed by weights ``[N, K]``."""
        rows = self.embedding(indices) if indices.dim() == 1 else indices @ self.embedding.weight
        return F.normalize(rows, dim=-1) if self.use_l2_norm else rows
