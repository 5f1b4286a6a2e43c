"""bytedance/1d-tokenizer, modeling/modules/maskgit_vqgan.py (open-muse's): VectorQuantizer."""

import torch
from torch import Tensor, nn


class VectorQuantizer(nn.Module):
    """Codes by a product with the one-hot matrix; without ``return_loss`` there is no straight-through gradient.

    ``get_codebook_entry`` is left out, and so is ``get_soft_code``, which returns a softmax over all codes.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, commitment_cost: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.commitment_cost = num_embeddings, embedding_dim, commitment_cost
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)

    def forward(self, hidden_states: Tensor, return_loss: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """``[B, C, H, W]`` -> quantized of that shape, indices ``[B, H * W]``, the loss or None."""
        z = hidden_states.permute(0, 2, 3, 1).contiguous()
        indices = self.compute_distances(z).argmin(dim=1, keepdim=True)
        one_hot = torch.zeros(len(indices), self.num_embeddings).to(z).scatter_(1, indices, 1)
        rows, loss = torch.matmul(one_hot, self.embedding.weight).view(z.shape), None
        if return_loss:
            loss = torch.mean((rows.detach() - z) ** 2)
            loss = loss + self.commitment_cost * torch.mean((rows - z.detach()) ** 2)
            rows = z + (rows - z).detach()
        return rows.permute(0, 3, 1, 2).contiguous(), indices.reshape(len(z), -1), loss

    def compute_distances(self, hidden_states: Tensor) -> Tensor:
        """Distances ``[N, K]``."""
        z, codes = hidden_states.reshape(-1, self.embedding_dim), self.embedding.weight.t()
        norms = z.pow(2).sum(dim=1, keepdim=True) + codes.pow(2).sum(dim=0, keepdim=True)
        return torch.addmm(norms, z, codes, alpha=-2.0)

    def get_code(self, hidden_states: Tensor) -> Tensor:
        """Indices ``[B, H * W]``."""
        z = hidden_states.permute(0, 2, 3, 1).contiguous()
        return self.compute_distances(z).argmin(dim=1).reshape(len(z), -1)
