"""The quantizers of TiTok, MaskBit and MaskGIT's VQGAN, known by name and by what they hold."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels import count_codes_
from revq_kernels.interop.families import embedding_parts as parts
from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import nearest, nearest_normalized


class _TiTok:
    """1d-tokenizer: VectorQuantizer, which moves unused codes (``clustering_vq``) by the samples that are nearest to them."""

    @torch.autocast("cuda", enabled=False)  # as the original: its float32 input stays float32
    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        moves = self.clustering_vq and self.training
        if moves and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            return super().forward(z)  # its nearest samples are those of all processes
        z = parts.to_channels_last(z.float())
        samples = z.view(-1, z.shape[-1])
        search = nearest_normalized if self.use_l2_norm else nearest
        indices = search(samples, self.embedding.weight)
        rows = self.get_codebook_entry(indices).view(z.shape)
        if self.use_l2_norm:
            rows, z = F.normalize(rows, dim=-1), F.normalize(z, dim=-1)
        commitment = self.commitment_cost * torch.mean((rows.detach() - z) ** 2)
        codebook = torch.mean((rows - z.detach()) ** 2)
        if moves:
            _move_unused(self, samples.detach(), indices, search(self.embedding.weight, samples))
        quantized = parts.to_channels_first(z + (rows - z).detach())
        return quantized, {
            "quantizer_loss": commitment + codebook,
            "commitment_loss": commitment,
            "codebook_loss": codebook,
            "min_encoding_indices": indices.view(quantized.shape[0], *quantized.shape[2:]),
        }


class _MaskBit:
    """MaskBit: SimpleVectorizer; training with its entropy loss, which sees every distance, stays the original's."""

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.entropy_loss_weight != 0.0 and self.training:
            return super().forward(z)
        z = parts.to_channels_last(z)
        search = nearest_normalized if self.use_l2_normalization else nearest
        indices = search(z.view(-1, z.shape[-1]), self.embedding.weight)
        if self.use_l2_normalization:
            z = F.normalize(z, dim=-1)
        rows = self.get_codebook_entry(indices).view(z.shape)
        commitment = self.commitment_cost * torch.mean((rows.detach() - z) ** 2)
        codebook = torch.mean((rows - z.detach()) ** 2)
        entropy, per_sample, average = (torch.zeros((), device=z.device) for _ in range(3))
        quantized = parts.to_channels_first(z + (rows - z).detach())
        return quantized, {
            "quantizer_loss": commitment + codebook + entropy,
            "commitment_loss": commitment,
            "codebook_loss": codebook,
            "entropy_loss": entropy,
            "per_sample_entropy": per_sample,
            "avg_entropy": average,
            "min_encoding_indices": indices.view(quantized.shape[0], *quantized.shape[2:]),
        }


class _MaskGIT:
    """1d-tokenizer, open-muse: VectorQuantizer of MaskGIT's VQGAN; ``get_soft_code`` is a softmax over all codes and stays."""

    def forward(self, hidden_states: Tensor, return_loss: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        z = parts.to_channels_last(hidden_states)
        indices = nearest(z.view(-1, self.embedding_dim), self.embedding.weight)
        rows, loss = self.embedding(indices).view(z.shape), None
        if return_loss:
            rows = parts.in_matmul_dtype(rows, z)
            z_q, loss = parts.straight_through(z, rows, self.commitment_cost, legacy=True)
        else:
            z_q = parts.in_matmul_dtype(rows)
        return parts.to_channels_first(z_q), indices.view(z.shape[0], -1), loss

    def get_code(self, hidden_states: Tensor) -> Tensor:
        return nearest(hidden_states.permute(0, 2, 3, 1), self.embedding.weight).flatten(1)


@torch.no_grad()
def _move_unused(module: nn.Module, samples: Tensor, indices: Tensor, closest: Tensor) -> None:
    """CVQ-VAE's step: the less a code was used of late, the nearer it moves to its closest sample."""
    count = torch.zeros(1, module.codebook_size, dtype=torch.int64, device=indices.device)
    used = count_codes_(count, indices.unsqueeze(1)).squeeze(0).to(module.embed_prob.dtype) / len(indices)
    module.embed_prob.mul_(module.decay).add_(used, alpha=1 - module.decay)
    decay = torch.exp(-(module.embed_prob * module.codebook_size * 10) / (1 - module.decay) - 1e-3).unsqueeze(1)
    module.embedding.weight.data = module.embedding.weight.data * (1 - decay) + samples[closest] * decay


def _unfit_titok(module: nn.Module) -> str | None:
    if {name for name in vars(module) if not name.startswith("_")} == {"training", "n_e", "e_dim", "beta"}:
        return "it returns the one-hot matrix of N x K numbers (VectorQuantizer2 computes the same without)"
    if not isinstance(module.use_l2_norm, bool) or not isinstance(module.clustering_vq, bool):
        return f"use_l2_norm={module.use_l2_norm!r}, clustering_vq={module.clustering_vq!r}: expected bools"
    if module.clustering_vq and tuple(module.embed_prob.shape) != (module.codebook_size,):
        return f"embed_prob is {tuple(module.embed_prob.shape)}, expected ({module.codebook_size},)"
    return parts.wrong_table(module, module.codebook_size, module.token_size)


def _unfit_maskbit(module: nn.Module) -> str | None:
    if not isinstance(module.use_l2_normalization, bool):
        return f"use_l2_normalization={module.use_l2_normalization!r}: expected a bool"
    if not isinstance(module.entropy_loss_weight, float | int):
        return f"entropy_loss_weight={module.entropy_loss_weight!r}: expected a number"
    return parts.wrong_table(module, module.embedding.num_embeddings, module.embedding.embedding_dim)


def _unfit_maskgit(module: nn.Module) -> str | None:
    return parts.wrong_table(module, module.num_embeddings, module.embedding_dim)


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, 2, module.embedding.weight.shape[1], 4, 8),))]


def _calls_maskgit(module: nn.Module, vectors: Vectors) -> list[Call]:
    ((x,),) = (call.args for call in _calls(module, vectors))
    return [Call("forward", (x,)), Call("forward", (x,), {"return_loss": True}), Call("get_code", (x,))]


FAMILIES = (
    Family("TiTok VectorQuantizer", ("*.VectorQuantizer",), _TiTok, _unfit_titok, _calls),
    Family("MaskGIT VectorQuantizer", ("*.VectorQuantizer",), _MaskGIT, _unfit_maskgit, _calls_maskgit),
    Family("MaskBit SimpleVectorizer", ("*.SimpleVectorizer",), _MaskBit, _unfit_maskbit, _calls),
)
