"""markweberdev/maskbit, modeling/quantizer/quantizer.py: SimpleVectorizer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.third_party_quantizers.distances import squared_distances


class SimpleVectorizer(nn.Module):
    """The entropy loss of training is restated for gamma = 1, which its recipes use."""

    def __init__(
        self,
        codebook_size: int = 1024,
        token_size: int = 256,
        commitment_cost: float = 0.25,
        entropy_loss_weight: float = 0.0,
        entropy_loss_temperature: float = 0.01,
        use_l2_normalization: bool = False,
    ) -> None:
        super().__init__()
        self.commitment_cost = commitment_cost
        self.embedding = nn.Embedding(codebook_size, token_size)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.entropy_loss_weight, self.entropy_loss_temperature = entropy_loss_weight, entropy_loss_temperature
        self.use_l2_normalization = use_l2_normalization

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z ``[B, C, H, W]`` -> quantized of that shape, losses and indices ``[B, H, W]``."""
        z, codes = z.permute(0, 2, 3, 1).contiguous(), self.embedding.weight
        if self.use_l2_normalization:
            z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        distances = squared_distances(z.view(-1, z.shape[-1]), codes)
        indices = distances.argmin(dim=1)
        rows = self.get_codebook_entry(indices).view(z.shape)
        commitment = self.commitment_cost * torch.mean((rows.detach() - z) ** 2)
        codebook = torch.mean((rows - z.detach()) ** 2)
        per_sample, average, entropy = (torch.zeros((), device=z.device) for _ in range(3))
        if self.entropy_loss_weight != 0.0 and self.training:
            per_sample, average = self._entropies(-distances / self.entropy_loss_temperature)
            entropy = self.entropy_loss_weight * (per_sample - average)
        quantized = (z + (rows - z).detach()).permute(0, 3, 1, 2).contiguous()
        results = {
            "quantizer_loss": commitment + codebook + entropy,
            "commitment_loss": commitment,
            "codebook_loss": codebook,
            "entropy_loss": entropy,
            "per_sample_entropy": per_sample,
            "avg_entropy": average,
            "min_encoding_indices": indices.view(z.shape[:-1]),
        }
        return quantized, results

    @staticmethod
    def _entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities, logarithms = logits.softmax(-1), logits.log_softmax(-1)
        mean = probabilities.mean(dim=0)
        return -(probabilities * logarithms).sum(-1).mean(), -(mean * torch.log(mean + 1e-10)).sum()

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """The codes of any indices, as rows."""
        rows = self.embedding(indices.int())
        return F.normalize(rows, dim=-1) if self.use_l2_normalization else rows
