"""Restates descript-audio-codec's ``dac/nn/quantize.py``: ``VectorQuantize`` and ``ResidualVectorQuantize``.

Left out: the dependency on einops and audiotools.  Kept: weight-normed 1x1 convolutions (``weight_g``, ``weight_v``), the
search among normalized codes that returns the code as it is, one loss per sample, and quantizer dropout, which draws in
every training call and ignores ``n_quantizers`` there.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm


class VectorQuantize(nn.Module):
    """One stage: project to few channels, search by direction, project back."""

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.in_proj = weight_norm(nn.Conv1d(input_dim, codebook_dim, kernel_size=1))
        self.out_proj = weight_norm(nn.Conv1d(codebook_dim, input_dim, kernel_size=1))
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z ``[B, C, T]`` -> quantized ``[B, C, T]``, the two losses ``[B]``, indices ``[B, T]``, the projected z."""
        z_e = self.in_proj(z)
        z_q, indices = self.decode_latents(z_e)
        commitment, codebook = (
            F.mse_loss(moves, stays.detach(), reduction="none").mean([1, 2])
            for moves, stays in ((z_e, z_q), (z_q, z_e))
        )
        return self.out_proj(z_e + (z_q - z_e).detach()), commitment, codebook, indices, z_e

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """Codes as rows."""
        return F.embedding(embed_id, self.codebook.weight)

    def decode_code(self, embed_id: Tensor) -> Tensor:
        """Indices ``[B, T]`` -> codes ``[B, d, T]``."""
        return self.embed_code(embed_id).transpose(1, 2)

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The unnormalized code with the smallest angle to each vector of ``[B, d, T]``, and its index."""
        batch, channels, length = latents.shape
        rows = F.normalize(latents.transpose(1, 2).reshape(batch * length, channels))
        codes = F.normalize(self.codebook.weight)
        distances = rows.square().sum(1, keepdim=True) - 2 * rows @ codes.t() + codes.square().sum(1)
        indices = (-distances).max(1).indices.view(batch, length)
        return self.decode_code(indices), indices


class ResidualVectorQuantize(nn.Module):
    """Stages that each quantize the residual of the previous stages."""

    def __init__(
        self,
        input_dim: int = 512,
        n_codebooks: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int | list[int] = 8,
        quantizer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dims = [codebook_dim] * n_codebooks if isinstance(codebook_dim, int) else codebook_dim
        self.n_codebooks, self.codebook_size, self.codebook_dim = n_codebooks, codebook_size, dims
        self.quantizer_dropout = quantizer_dropout
        self.quantizers = nn.ModuleList(VectorQuantize(input_dim, codebook_size, dim) for dim in dims[:n_codebooks])

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> dict[str, Tensor]:
        """z ``[B, C, T]`` through the first ``n_quantizers`` stages, or in training through as many as dropout keeps."""
        batch = z.shape[0]
        stages = torch.full((batch,), self.n_codebooks if n_quantizers is None else n_quantizers)
        if self.training:
            dropped = int(batch * self.quantizer_dropout)
            drawn = torch.randint(1, self.n_codebooks + 1, (batch,))
            stages = torch.cat([drawn[:dropped], torch.full((batch - dropped,), self.n_codebooks + 1)])
        residual, z_q, commitment, codebook, codes, latents = z, 0, 0, 0, [], []
        for stage, quantizer in enumerate(self.quantizers):
            if not self.training and stage >= stages[0]:
                break
            part, commitment_part, codebook_part, indices, z_e = quantizer(residual)
            used = (stage < stages).to(z.device)
            z_q = z_q + part * used[:, None, None]
            residual = residual - part
            commitment = commitment + (commitment_part * used).mean()
            codebook = codebook + (codebook_part * used).mean()
            codes.append(indices)
            latents.append(z_e)
        return {
            "z": z_q,
            "codes": torch.stack(codes, dim=1),
            "latents": torch.cat(latents, dim=1),
            "vq/commitment_loss": commitment,
            "vq/codebook_loss": codebook,
        }

    def from_codes(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices ``[B, stages, T]`` -> quantized, the codes concatenated, the indices."""
        used = list(zip(self.quantizers, codes.unbind(1), strict=False))
        parts = [quantizer.decode_code(indices) for quantizer, indices in used]
        z_q = sum(quantizer.out_proj(part) for (quantizer, _), part in zip(used, parts, strict=True))
        return z_q, torch.cat(parts, dim=1), codes

    def from_latents(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected latents, concatenated -> quantized, the codes concatenated, their indices."""
        ends = itertools.accumulate(quantizer.codebook_dim for quantizer in self.quantizers)
        z_q, parts, codes = 0, [], []
        for quantizer, end in zip(self.quantizers, ends, strict=True):
            if end > latents.shape[1]:
                break
            part, indices = quantizer.decode_latents(latents[:, end - quantizer.codebook_dim : end])
            z_q = z_q + quantizer.out_proj(part)
            parts.append(part)
            codes.append(indices)
        return z_q, torch.cat(parts, dim=1), torch.stack(codes, dim=1)
