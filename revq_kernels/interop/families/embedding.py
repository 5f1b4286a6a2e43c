"""Image quantizers around ``embedding.weight`` ``[K, d]``: diffusers, transformers, taming, SimVQ, TiTok, MaskBit, MaskGIT."""

import torch
import torch.nn.functional as F
from torch import Tensor

from revq_kernels import count_codes_
from revq_kernels.interop.families.family import Call, Family, Quantizer, Vectors, source_of
from revq_kernels.interop.search import in_matmul_dtype, nearest, nearest_normalized


def _straight_through(z: Tensor, rows: Tensor, beta: float, legacy: bool) -> tuple[Tensor, Tensor]:
    """The codes ``rows`` with z's gradient, and the loss.  ``legacy`` weights the codebook's term by beta, as checkpoints do."""
    if legacy:
        loss = torch.mean((rows.detach() - z) ** 2) + beta * torch.mean((rows - z.detach()) ** 2)
    else:
        loss = beta * torch.mean((rows.detach() - z) ** 2) + torch.mean((rows - z.detach()) ** 2)
    return z + (rows - z).detach(), loss


def _to_channels_last(z: Tensor) -> Tensor:
    """``[B, C, H, W]`` as contiguous ``[B, H, W, C]``."""
    return z.permute(0, 2, 3, 1).contiguous()


def _to_channels_first(z: Tensor) -> Tensor:
    """``[B, H, W, C]`` as contiguous ``[B, C, H, W]``."""
    return z.permute(0, 3, 1, 2).contiguous()


def _formatted_indices(module: Quantizer, indices: Tensor, quantized: Tensor) -> Tensor:
    """Flat indices in the format of taming's options ``remap`` and ``sane_index_shape``."""
    if module.remap is not None:
        indices = module.remap_to_used(indices.reshape(quantized.shape[0], -1)).reshape(-1, 1)
    if module.sane_index_shape:
        indices = indices.reshape(quantized.shape[0], quantized.shape[2], quantized.shape[3])
    return indices


def _remap_to_used(self: Quantizer, inds: Tensor) -> Tensor:
    """taming's method of that name, by bisection: the original compares every index with every entry of ``used``."""
    assert inds.dim() > 1
    used, order = self.used.to(inds).sort(stable=True)
    place = torch.searchsorted(used, inds).clamp(max=len(used) - 1)  # the first among equals, as argmax gives
    remapped, unknown = order[place], used[place] != inds
    if self.unknown_index != "random":
        return remapped.masked_fill(unknown, self.unknown_index)
    drawn = torch.randint(self.re_embed, remapped[unknown].shape)  # on the CPU, as the original's
    return remapped.masked_scatter(unknown, drawn.to(remapped.device))


def _table_mismatch(module: Quantizer, *shape: int) -> str | None:
    """Why ``embedding.weight`` is not what a family expects; None if it is."""
    table = module.embedding.weight
    if tuple(table.shape) != shape:
        return f"embedding.weight is {tuple(table.shape)}, expected {shape}"
    return None


def _calls(module: Quantizer, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, vectors.batch, module.embedding.weight.shape[1], 4, 8),))]


# diffusers and transformers


class _Diffusers:
    """diffusers 0.42: VectorQuantizer of VQModel and PaellaVQModel."""

    def forward(self: Quantizer, z: Tensor) -> tuple[Tensor, Tensor, tuple]:
        z = _to_channels_last(z)
        indices = nearest(z.view(-1, self.vq_embed_dim), self.embedding.weight)
        z_q, loss = _straight_through(z, self.embedding(indices).view(z.shape), self.beta, self.legacy)
        z_q = _to_channels_first(z_q)
        return z_q, loss, (None, None, _formatted_indices(self, indices, z_q))

    remap_to_used = _remap_to_used


class _Chameleon:
    """transformers 5.23: ChameleonVQVAEVectorQuantizer and JanusVQVAEVectorQuantizer, whose forward is the same."""

    def forward(self: Quantizer, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = _to_channels_last(hidden_state)
        indices = nearest(z.view(-1, self.embedding_dim), self.embedding.weight)
        z_q, loss = _straight_through(z, self.embedding(indices).view(z.shape), self.beta, legacy=True)
        return _to_channels_first(z_q), loss, indices


class _GlmImage:
    """transformers 5.23: GlmImageVQVAEVectorQuantizer, which searches and returns normalized codes."""

    def forward(self: Quantizer, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = _to_channels_last(hidden_state)
        indices = nearest_normalized(z.view(-1, self.embedding_dim), self.embedding.weight)
        z = F.normalize(z, p=2, dim=-1)
        rows = F.normalize(self.embedding.weight, p=2, dim=-1)[indices]
        z_q, loss = _straight_through(z, rows.view(z.shape), self.beta, legacy=True)
        return _to_channels_first(z_q), loss, indices


class _Emu3:
    """transformers 5.23: Emu3VQVAEVectorQuantizer, which returns indices only."""

    def forward(self: Quantizer, hidden_state: Tensor) -> Tensor:
        return nearest(hidden_state.permute(0, 1, 3, 4, 2), self.embedding.weight)


def _unsupported_diffusers(module: Quantizer) -> str | None:
    if module.legacy not in (True, False) or (module.remap is not None and module.used.dim() != 1):
        return f"legacy={module.legacy!r}, remap={module.remap!r}: expected a bool, and None or a list of indices"
    return _table_mismatch(module, module.n_e, module.vq_embed_dim)


def _unsupported_transformers(module: Quantizer) -> str | None:
    return _table_mismatch(module, module.num_embeddings, module.embedding_dim)


def _unsupported_emu3(module: Quantizer) -> str | None:
    if module.embedding.weight.dim() != 2:
        return f"embedding.weight is {tuple(module.embedding.weight.shape)}, expected [K, d]"
    return None


def _calls_emu3(module: Quantizer, vectors: Vectors) -> list[Call]:
    return [
        Call("forward", (vectors(module.embedding.weight, vectors.batch, 2, module.embedding.weight.shape[1], 4, 4),))
    ]


# taming-transformers and SEED-Voken: VectorQuantizer2, IBQ, SimVQ


class _Taming:
    """taming-transformers: VectorQuantizer2, to which SEED-Voken's IBQ adds ``l2_normalize``."""

    def forward(
        self: Quantizer, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple]:
        _check_gumbel_arguments(temp, rescale_logits, return_logits)
        z = _to_channels_last(z)
        search = nearest_normalized if getattr(self, "l2_normalize", False) else nearest
        indices = search(z.view(-1, self.e_dim), self.embedding.weight)
        z_q, loss = _straight_through(z, self.embedding(indices).view(z.shape), self.beta, self.legacy)
        z_q = _to_channels_first(z_q)
        return z_q, loss, (None, None, _formatted_indices(self, indices, z_q))

    remap_to_used = _remap_to_used


class _SimVQ:
    """SEED-Voken: SimVQ and SimVQ1D, whose codes are a linear map of a frozen table."""

    def forward(
        self: Quantizer, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[tuple, tuple]:
        _check_gumbel_arguments(temp, rescale_logits, return_logits)
        z = z.movedim(1, -1).contiguous()
        assert z.shape[-1] == self.e_dim
        with torch.autocast(z.device.type, enabled=False):  # for exact indices the codes must not be rounded
            codebook = self.embedding_proj(self.embedding.weight)
        indices = nearest(z.view(-1, self.e_dim), codebook)
        rows = in_matmul_dtype(F.embedding(indices, codebook), z).view(z.shape)
        z_q, loss = _straight_through(z, rows, self.beta, self.legacy)
        z_q = z_q.movedim(-1, 1).contiguous()
        zero = torch.tensor(0.0)  # on the CPU for every device of z, as in the original
        breakdown = source_of(self).LossBreakdown(zero, zero, loss, zero)
        return (z_q, zero, _formatted_indices(self, indices, z_q)), breakdown

    remap_to_used = _remap_to_used


def _check_gumbel_arguments(temp: float | None, rescale_logits: bool, return_logits: bool) -> None:
    """taming's assertions: only its GumbelQuantize, which has the same signature, uses these arguments."""
    message = "Only for interface compatible with Gumbel"
    assert temp is None or temp == 1.0, message
    assert rescale_logits == False, message  # noqa: E712
    assert return_logits == False, message  # noqa: E712


def _unsupported_taming(module: Quantizer) -> str | None:
    if module.legacy not in (True, False) or (module.remap is not None and module.used.dim() != 1):
        return f"legacy={module.legacy!r}, remap={module.remap!r}: expected a bool, and None or a list of indices"
    if not isinstance(module.sane_index_shape, bool) or not isinstance(module.beta, float | int):
        return f"sane_index_shape={module.sane_index_shape!r}, beta={module.beta!r}: expected a bool and a number"
    return _table_mismatch(module, module.n_e, module.e_dim)


def _unsupported_simvq(module: Quantizer) -> str | None:
    if tuple(module.embedding_proj.weight.shape) != (module.e_dim, module.e_dim):
        return f"embedding_proj.weight is {tuple(module.embedding_proj.weight.shape)}, expected [d, d]"
    if not hasattr(source_of(module), "LossBreakdown"):
        return f"{module.__module__} has no LossBreakdown to return"
    return _unsupported_taming(module)


def _calls_simvq1d(module: Quantizer, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, vectors.batch, module.e_dim, 32),))]


# TiTok, MaskBit and MaskGIT's VQGAN


class _TiTok:
    """1d-tokenizer: VectorQuantizer, which moves rarely used codes (``clustering_vq``) towards their nearest samples."""

    @torch.autocast("cuda", enabled=False)  # as the original, whose float32 input stays float32
    def forward(self: Quantizer, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        moves = self.clustering_vq and self.training
        if moves and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            return self.revq_original.forward(self, z)  # the original searches the samples of all processes
        z = _to_channels_last(z.float())
        samples = z.view(-1, z.shape[-1])
        search = nearest_normalized if self.use_l2_norm else nearest
        indices = search(samples, self.embedding.weight)
        rows = self.get_codebook_entry(indices).view(z.shape)
        if self.use_l2_norm:
            rows, z = F.normalize(rows, dim=-1), F.normalize(z, dim=-1)
        quantized, losses = _separate_losses(z, rows, self.commitment_cost)
        if moves:
            _move_unused(self, samples.detach(), indices, search(self.embedding.weight, samples))
        return quantized, losses | {"min_encoding_indices": indices.view(len(quantized), *quantized.shape[2:])}


class _MaskBit:
    """MaskBit: SimpleVectorizer; training with its entropy loss, which reads every distance, stays the original's."""

    def forward(self: Quantizer, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.entropy_loss_weight != 0.0 and self.training:
            return self.revq_original.forward(self, z)
        z = _to_channels_last(z)
        search = nearest_normalized if self.use_l2_normalization else nearest
        indices = search(z.view(-1, z.shape[-1]), self.embedding.weight)
        if self.use_l2_normalization:
            z = F.normalize(z, dim=-1)
        rows = self.get_codebook_entry(indices).view(z.shape)
        quantized, losses = _separate_losses(z, rows, self.commitment_cost)
        names = ("entropy_loss", "per_sample_entropy", "avg_entropy")
        losses |= {name: torch.zeros((), device=z.device) for name in names}
        losses["quantizer_loss"] = (
            losses["quantizer_loss"] + losses["entropy_loss"]
        )  # as the original: float32 at least
        return quantized, losses | {"min_encoding_indices": indices.view(len(quantized), *quantized.shape[2:])}


class _MaskGIT:
    """1d-tokenizer, open-muse: VectorQuantizer of MaskGIT's VQGAN; ``get_soft_code``, a softmax over all codes, stays."""

    def forward(
        self: Quantizer, hidden_states: Tensor, return_loss: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        z = _to_channels_last(hidden_states)
        indices = nearest(z.view(-1, self.embedding_dim), self.embedding.weight)
        rows, loss = self.embedding(indices).view(z.shape), None
        if return_loss:
            rows = in_matmul_dtype(rows, z)
            z_q, loss = _straight_through(z, rows, self.commitment_cost, legacy=True)
        else:
            z_q = in_matmul_dtype(rows)
        return _to_channels_first(z_q), indices.view(z.shape[0], -1), loss

    def get_code(self: Quantizer, hidden_states: Tensor) -> Tensor:
        return nearest(hidden_states.permute(0, 2, 3, 1), self.embedding.weight).flatten(1)


def _separate_losses(z: Tensor, rows: Tensor, commitment_cost: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The codes ``rows`` with z's gradient, channels first, and the two losses and their sum by TiTok's names."""
    commitment = commitment_cost * torch.mean((rows.detach() - z) ** 2)
    codebook = torch.mean((rows - z.detach()) ** 2)
    losses = {
        "quantizer_loss": commitment + codebook,
        "commitment_loss": commitment,
        "codebook_loss": codebook,
    }
    return _to_channels_first(z + (rows - z).detach()), losses


@torch.no_grad()
def _move_unused(module: Quantizer, samples: Tensor, indices: Tensor, closest: Tensor) -> None:
    """The update of CVQ-VAE: the less a code was used recently, the more it moves to its closest sample."""
    count = torch.zeros(1, module.codebook_size, dtype=torch.int64, device=indices.device)
    used = count_codes_(count, indices.unsqueeze(1)).squeeze(0).to(module.embed_prob.dtype) / len(indices)
    module.embed_prob.mul_(module.decay).add_(used, alpha=1 - module.decay)
    rate = module.embed_prob * module.codebook_size * 10 / (1 - module.decay)
    weight = torch.exp(-rate - 1e-3).unsqueeze(1)
    table = module.embedding.weight
    table.data = table.data * (1 - weight) + samples[closest] * weight


def _unsupported_titok(module: Quantizer) -> str | None:
    if {name for name in vars(module) if not name.startswith("_")} == {"training", "n_e", "e_dim", "beta"}:
        return "it returns the one-hot matrix of N x K numbers (VectorQuantizer2 computes the same without)"
    if not isinstance(module.use_l2_norm, bool) or not isinstance(module.clustering_vq, bool):
        return f"use_l2_norm={module.use_l2_norm!r}, clustering_vq={module.clustering_vq!r}: expected bools"
    if module.clustering_vq and tuple(module.embed_prob.shape) != (module.codebook_size,):
        return f"embed_prob is {tuple(module.embed_prob.shape)}, expected ({module.codebook_size},)"
    return _table_mismatch(module, module.codebook_size, module.token_size)


def _unsupported_maskbit(module: Quantizer) -> str | None:
    if not isinstance(module.use_l2_normalization, bool):
        return f"use_l2_normalization={module.use_l2_normalization!r}: expected a bool"
    if not isinstance(module.entropy_loss_weight, float | int):
        return f"entropy_loss_weight={module.entropy_loss_weight!r}: expected a number"
    return _table_mismatch(module, module.embedding.num_embeddings, module.embedding.embedding_dim)


def _calls_maskgit(module: Quantizer, vectors: Vectors) -> list[Call]:
    ((x,),) = (call.args for call in _calls(module, vectors))
    return [Call("forward", (x,)), Call("forward", (x,), {"return_loss": True}), Call("get_code", (x,))]


_MODELS = "transformers.models"
FAMILIES = (
    Family(
        "diffusers VectorQuantizer",
        ("diffusers.models.autoencoders.vae.VectorQuantizer",),
        _Diffusers,
        _unsupported_diffusers,
        _calls,
    ),
    Family(
        "transformers Chameleon, Janus",
        (
            f"{_MODELS}.chameleon.modeling_chameleon.ChameleonVQVAEVectorQuantizer",
            f"{_MODELS}.janus.modeling_janus.JanusVQVAEVectorQuantizer",
        ),
        _Chameleon,
        _unsupported_transformers,
        _calls,
    ),
    Family(
        "transformers GLM-Image",
        (f"{_MODELS}.glm_image.modeling_glm_image.GlmImageVQVAEVectorQuantizer",),
        _GlmImage,
        _unsupported_transformers,
        _calls,
    ),
    Family(
        "transformers Emu3",
        (f"{_MODELS}.emu3.modeling_emu3.Emu3VQVAEVectorQuantizer",),
        _Emu3,
        _unsupported_emu3,
        _calls_emu3,
    ),
    Family("taming, IBQ VectorQuantizer2", ("*.VectorQuantizer2",), _Taming, _unsupported_taming, _calls),
    Family("SimVQ", ("*.SimVQ",), _SimVQ, _unsupported_simvq, _calls),
    Family("SimVQ1D", ("*.SimVQ1D",), _SimVQ, _unsupported_simvq, _calls_simvq1d),
    Family("TiTok VectorQuantizer", ("*.VectorQuantizer",), _TiTok, _unsupported_titok, _calls),
    Family("MaskGIT VectorQuantizer", ("*.VectorQuantizer",), _MaskGIT, _unsupported_transformers, _calls_maskgit),
    Family("MaskBit SimpleVectorizer", ("*.SimpleVectorizer",), _MaskBit, _unsupported_maskbit, _calls),
)
