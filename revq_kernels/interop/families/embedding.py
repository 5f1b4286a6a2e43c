"""diffusers' and transformers' image quantizers, which hold ``embedding.weight`` ``[K, d]``."""

import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels.interop.families import embedding_parts as parts
from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import nearest, nearest_normalized


class _Diffusers:
    """diffusers 0.42: VectorQuantizer of VQModel and PaellaVQModel."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple]:
        z = parts.to_channels_last(z)
        indices = nearest(z.view(-1, self.vq_embed_dim), self.embedding.weight)
        z_q, loss = parts.straight_through(z, self.embedding(indices).view(z.shape), self.beta, self.legacy)
        z_q = parts.to_channels_first(z_q)
        return z_q, loss, (None, None, parts.arranged(self, indices, z_q))

    def remap_to_used(self, inds: Tensor) -> Tensor:
        return parts.remap_to_used(self, inds)


class _Chameleon:
    """transformers 5.23: ChameleonVQVAEVectorQuantizer and Janus', with one forward."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = parts.to_channels_last(hidden_state)
        indices = nearest(z.view(-1, self.embedding_dim), self.embedding.weight)
        z_q, loss = parts.straight_through(z, self.embedding(indices).view(z.shape), self.beta, legacy=True)
        return parts.to_channels_first(z_q), loss, indices


class _GlmImage:
    """transformers 5.23: GlmImageVQVAEVectorQuantizer, which searches and returns directions."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = parts.to_channels_last(hidden_state)
        indices = nearest_normalized(z.view(-1, self.embedding_dim), self.embedding.weight)
        z = F.normalize(z, p=2, dim=-1)
        rows = F.normalize(self.embedding.weight, p=2, dim=-1)[indices]
        z_q, loss = parts.straight_through(z, rows.view(z.shape), self.beta, legacy=True)
        return parts.to_channels_first(z_q), loss, indices


class _Emu3:
    """transformers 5.23: Emu3VQVAEVectorQuantizer, which gives indices alone."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return nearest(hidden_state.permute(0, 1, 3, 4, 2), self.embedding.weight)


def _unfit_diffusers(module: nn.Module) -> str | None:
    if module.legacy not in (True, False) or (module.remap is not None and module.used.dim() != 1):
        return f"legacy={module.legacy!r}, remap={module.remap!r}: expected a bool, and None or a list of indices"
    return parts.wrong_table(module, module.n_e, module.vq_embed_dim)


def _unfit_transformers(module: nn.Module) -> str | None:
    return parts.wrong_table(module, module.num_embeddings, module.embedding_dim)


def _unfit_emu3(module: nn.Module) -> str | None:
    if module.embedding.weight.dim() != 2:
        return f"embedding.weight is {tuple(module.embedding.weight.shape)}, expected [K, d]"
    return None


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, 2, module.embedding.weight.shape[1], 4, 8),))]


def _calls_emu3(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, 2, 2, module.embedding.weight.shape[1], 4, 4),))]


_MODELS = "transformers.models"
FAMILIES = (
    Family(
        "diffusers VectorQuantizer",
        ("diffusers.models.autoencoders.vae.VectorQuantizer",),
        _Diffusers,
        _unfit_diffusers,
        _calls,
    ),
    Family(
        "transformers Chameleon, Janus",
        (
            f"{_MODELS}.chameleon.modeling_chameleon.ChameleonVQVAEVectorQuantizer",
            f"{_MODELS}.janus.modeling_janus.JanusVQVAEVectorQuantizer",
        ),
        _Chameleon,
        _unfit_transformers,
        _calls,
    ),
    Family(
        "transformers GLM-Image",
        (f"{_MODELS}.glm_image.modeling_glm_image.GlmImageVQVAEVectorQuantizer",),
        _GlmImage,
        _unfit_transformers,
        _calls,
    ),
    Family(
        "transformers Emu3",
        (f"{_MODELS}.emu3.modeling_emu3.Emu3VQVAEVectorQuantizer",),
        _Emu3,
        _unfit_emu3,
        _calls_emu3,
    ),
)
