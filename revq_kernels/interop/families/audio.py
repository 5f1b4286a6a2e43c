"""Codebooks of neural audio codecs: EnCodec and its forks, Mimi, X-Codec, Higgs Audio, DAC and SNAC.

The residual quantizers around these codebooks stay as they are.
"""

import torch
from torch import Tensor, nn

from revq_kernels.interop.families.family import Call, Family, Quantizer, Vectors
from revq_kernels.interop.search import (
    code_counts,
    code_sums,
    has_zero_code,
    kmeans,
    kmeans_mismatch,
    nearest,
    nearest_normalized,
    with_kmeans,
)

# EnCodec, Mimi, X-Codec and Higgs Audio of transformers


class _Frozen:
    """transformers 5.23: EncodecEuclideanCodebook, and those of X-Codec and Higgs Audio; they have no training."""

    def quantize(self: Quantizer, hidden_states: Tensor) -> Tensor:
        return nearest(hidden_states, self.embed)


class _Mimi:
    """transformers 5.23: MimiEuclideanCodebook, which computes its codes from two buffers once and keeps them."""

    def quantize(self: Quantizer, hidden_states: Tensor) -> Tensor:
        return nearest(hidden_states.float(), self.embed.float())


def _unsupported_frozen(module: Quantizer) -> str | None:
    return _table_mismatch("embed", module.embed, module.codebook_size)


def _unsupported_mimi(module: Quantizer) -> str | None:
    if tuple(module.cluster_usage.shape) != (module.codebook_size,):
        return f"cluster_usage is {tuple(module.cluster_usage.shape)}, expected [{module.codebook_size}]"
    return _table_mismatch("embed_sum", module.embed_sum, module.codebook_size)


def _table_mismatch(name: str, table: Tensor, num_codes: int) -> str | None:
    right = table.dim() == 2 and table.shape[0] == num_codes
    return None if right else f"{name} is {tuple(table.shape)}, expected [{num_codes}, d]"


def _calls_frozen(module: Quantizer, vectors: Vectors) -> list[Call]:
    return [Call("encode", (vectors(module.embed, vectors.batch, 32, module.embed.shape[1]),))]


def _calls_mimi(module: Quantizer, vectors: Vectors) -> list[Call]:
    # Not module.embed: reading it would make the module keep its codes
    codes = module.embed_sum / module.cluster_usage.clamp(min=module.epsilon)[:, None]
    return [Call("encode", (vectors(codes, vectors.batch, 32, codes.shape[1]),))]


# encodec, audiocraft, SpeechTokenizer and WavTokenizer


class _Averaged:
    """encodec 0.1.1: EuclideanCodebook, and those of the forks in audiocraft, SpeechTokenizer and WavTokenizer."""

    def init_embed_(self: Quantizer, data: Tensor) -> None:
        if not self.inited:
            with_kmeans(self.revq_original.init_embed_, _kmeans)(self, data)

    def quantize(self: Quantizer, x: Tensor) -> Tensor:
        return nearest(x, self.embed)

    def forward(self: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        x = self.preprocess(x)
        self.init_embed_(x)
        indices = self.quantize(x)
        embed_ind = self.postprocess_emb(indices, shape)
        quantize = self.dequantize(embed_ind)
        if self.training:
            # Before the averages, which then overwrite the replaced codes, as in the original
            self.expire_codes_(x)
            self._update_averages(x, indices)
        return quantize, embed_ind

    def _update_averages(self: Quantizer, x: Tensor, indices: Tensor) -> None:
        count = code_counts(indices, self.codebook_size)
        total = code_sums(x[None], indices[None], self.codebook_size)[0]
        for average, value in ((self.cluster_size, count), (self.embed_avg, total)):
            average.data.mul_(self.decay).add_(value.to(average.dtype), alpha=1 - self.decay)
        size = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.epsilon) / (size + self.codebook_size * self.epsilon) * size
        self.embed.data.copy_(self.embed_avg / smoothed.unsqueeze(1))


def _kmeans(samples: Tensor, num_clusters: int, num_iters: int = 10) -> tuple[Tensor, Tensor]:
    """encodec's function ``kmeans``, with its random draws: means ``[K, d]`` and their counts ``[K]`` of samples ``[N, d]``."""
    samples, total = samples.detach(), len(samples)
    if total >= num_clusters:
        drawn = torch.randperm(total, device=samples.device)[:num_clusters]
    else:
        drawn = torch.randint(total, (num_clusters,), device=samples.device)

    def assign(samples: Tensor, means: Tensor) -> Tensor:
        return nearest(samples[0], means[0])[None]

    means, count = kmeans(samples[None], samples[drawn][None], num_iters, assign)
    return means[0], count[0]


def _unsupported_averaged(module: Quantizer) -> str | None:
    for name in ("embed", "embed_avg"):
        if reason := _table_mismatch(name, getattr(module, name), module.codebook_size):
            return reason
    attributes = "inited cluster_size decay epsilon expire_codes_ preprocess postprocess_emb dequantize"
    if missing := [name for name in attributes.split() if not hasattr(module, name)]:
        return f"it has no {', '.join(missing)}"
    return kmeans_mismatch(module.init_embed_.__func__, _kmeans)


def _calls_averaged(module: Quantizer, vectors: Vectors) -> list[Call]:
    return [
        Call(method, (vectors(module.embed, vectors.batch, 32, module.embed.shape[1]),))
        for method in ("encode", "forward")
    ]


# DAC and SNAC, which compare normalized vectors and return the code as it is


class _TransformersDac:
    """transformers 5.23: DacVectorQuantize."""

    def decode_latents(self: Quantizer, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        # The hook of accelerate loads offloaded weights, also for code that reads them without a call of the module
        hook = getattr(self.codebook, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.codebook)
        # The original adds |c|^2 instead of subtracting it, which gives the same order among codes of length 1
        indices = nearest_normalized(hidden_states.transpose(1, 2), self.codebook.weight)
        if hook is not None:
            hook.post_forward(self.codebook, ())
        return self.codebook(indices).transpose(1, 2), indices


class _Dac:
    """descript-audio-codec's and SNAC's VectorQuantize."""

    def decode_latents(self: Quantizer, latents: Tensor) -> tuple[Tensor, Tensor]:
        indices = nearest_normalized(latents.transpose(1, 2), self.codebook.weight)
        return self.decode_code(indices), indices


def _unsupported_dac(module: Quantizer) -> str | None:
    if not isinstance(module.codebook, nn.Embedding):
        return f"codebook is {type(module.codebook).__name__}, expected Embedding"
    shape = tuple(module.codebook.weight.shape)
    return (
        None if shape[1] == module.codebook_dim else f"codebook.weight is {shape}, expected [K, {module.codebook_dim}]"
    )


def _unsupported_transformers_dac(module: Quantizer) -> str | None:
    if has_zero_code(module.codebook.weight):
        return "a code is zero, and its sign of |c|^2 then matters"
    return _unsupported_dac(module)


def _calls_dac(module: Quantizer, vectors: Vectors) -> list[Call]:
    table = module.codebook.weight
    latents, hidden = (
        vectors(table, vectors.batch, module.codebook_dim, 32),
        vectors(table, vectors.batch, module.in_proj.in_channels, 32),
    )
    return [Call("decode_latents", (latents,)), Call("forward", (hidden,))]


_FROZEN = (
    "transformers.models.encodec.modeling_encodec.EncodecEuclideanCodebook",
    "transformers.models.xcodec.modeling_xcodec.XcodecEuclideanCodebook",
    "transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer.HiggsAudioV2TokenizerEuclideanCodebook",
)
_MIMI = ("transformers.models.mimi.modeling_mimi.MimiEuclideanCodebook",)
_DAC = ("transformers.models.dac.modeling_dac.DacVectorQuantize",)

FAMILIES = (
    Family("transformers EnCodec, X-Codec, Higgs Audio", _FROZEN, _Frozen, _unsupported_frozen, _calls_frozen),
    Family("transformers Mimi", _MIMI, _Mimi, _unsupported_mimi, _calls_mimi),
    Family("encodec", ("*.EuclideanCodebook",), _Averaged, _unsupported_averaged, _calls_averaged, "inited"),
    Family("transformers DAC", _DAC, _TransformersDac, _unsupported_transformers_dac, _calls_dac),
    Family("descript-audio-codec", ("*.VectorQuantize",), _Dac, _unsupported_dac, _calls_dac),
)
