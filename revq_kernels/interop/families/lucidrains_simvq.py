"""vector-quantize-pytorch 1.32: SimVQ, alone and in ResidualSimVQ."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels.interop.families.embedding_parts import in_matmul_dtype
from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import nearest


class _SimVQ:
    """SimVQ's forward: the codes are a learned map of a frozen codebook."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

        if self.channel_first:
            x = x.movedim(1, -1)
        shape = x.shape
        x = x.reshape(len(x), -1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # the search wants the codes in float32, not rounded
            codebook = self.codebook
        indices = nearest(x, codebook)
        quantized = in_matmul_dtype(F.embedding(indices, codebook), x)
        commit_loss = (
            F.mse_loss(x.detach(), quantized)
            + F.mse_loss(x, quantized.detach()) * self.input_to_quantize_commit_loss_weight
        )
        quantized = rotate_to(x, quantized) if self.rotation_trick else (quantized - x).detach() + x
        quantized, indices = quantized.reshape(shape), indices.reshape(shape[:-1])
        if self.channel_first:
            quantized = quantized.movedim(-1, 1)
        return quantized, indices, commit_loss * self.commitment_weight


def _unfit(module: nn.Module) -> str | None:
    with torch.no_grad():
        codes = module.codebook
    if codes.dim() != 2 or len(codes) != module.codebook_size:
        return f"the codebook is {tuple(codes.shape)}, expected [{module.codebook_size}, d]"
    return None


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    with torch.no_grad():
        codes = module.codebook
    dim = codes.shape[1]
    shape = (2, dim, 4, 8) if module.channel_first else (2, 4, 8, dim)
    return [Call("forward", (vectors(codes, *shape),))]


FAMILIES = (Family("vector-quantize-pytorch SimVQ", ("vector_quantize_pytorch.sim_vq.SimVQ",), _SimVQ, _unfit, _calls),)
