"""Quantizers that hold ``embedding.weight`` ``[K, d]``, take ``[B, C, H, W]`` and compute losses beside the indices."""

import torch
from torch import Tensor, nn

from revq.integrations.family import Call, Family, Vectors
from revq.integrations.search import nearest


class _Chameleon:
    """transformers 5.23: ChameleonVQVAEVectorQuantizer and Janus', with one forward."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_state = hidden_state.permute(0, 2, 3, 1).contiguous()
        indices = nearest(hidden_state.view(-1, self.embedding_dim), self.embedding.weight)
        quantized = self.embedding(indices).view(hidden_state.shape)
        loss = torch.mean((quantized.detach() - hidden_state) ** 2)
        loss = loss + self.beta * torch.mean((quantized - hidden_state.detach()) ** 2)
        quantized = hidden_state + (quantized - hidden_state).detach()
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, indices


def _unfit(module: nn.Module) -> str | None:
    table = module.embedding.weight
    if table.dim() != 2 or table.shape[1] != module.embedding_dim:
        return f"embedding.weight is {tuple(table.shape)}, expected [K, {module.embedding_dim}]"
    return None


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, 2, module.embedding_dim, 4, 8),))]


FAMILIES = (
    Family(
        "transformers Chameleon, Janus",
        (
            "transformers.models.chameleon.modeling_chameleon.ChameleonVQVAEVectorQuantizer",
            "transformers.models.janus.modeling_janus.JanusVQVAEVectorQuantizer",
        ),
        _Chameleon,
        _unfit,
        _calls,
    ),
)
