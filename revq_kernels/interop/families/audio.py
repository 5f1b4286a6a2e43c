"""Codebooks of neural audio codecs: EnCodec and its forks, Mimi, X-Codec, Higgs Audio.

What is replaced stands inside the residual quantizers, which stay as they are.
"""

import inspect
from types import FunctionType

import torch
from torch import Tensor, nn

from revq_kernels import segment_sum
from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import count_choices, nearest


class _Frozen:
    """transformers 5.23: EncodecEuclideanCodebook, X-Codec's and Higgs Audio's, which do not train."""

    def quantize(self, hidden_states: Tensor) -> Tensor:
        return nearest(hidden_states, self.embed)


class _Mimi:
    """transformers 5.23: MimiEuclideanCodebook, which makes its codes from two buffers once and keeps them."""

    def quantize(self, hidden_states: Tensor) -> Tensor:
        return nearest(hidden_states.float(), self.embed.float())


class _Averaged:
    """encodec 0.1.1: EuclideanCodebook, and the forks of audiocraft, SpeechTokenizer and WavTokenizer."""

    def init_embed_(self, data: Tensor) -> None:
        if not self.inited:
            _with_search(super().init_embed_.__func__)(self, data)

    def quantize(self, x: Tensor) -> Tensor:
        return nearest(x, self.embed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        x = self.preprocess(x)
        self.init_embed_(x)
        indices = self.quantize(x)
        embed_ind = self.postprocess_emb(indices, shape)
        quantize = self.dequantize(embed_ind)
        if self.training:
            # before the averages, which then overwrite the codes that it replaces: as the original
            self.expire_codes_(x)
            count, total = count_choices(indices, self.codebook_size), _sum(x, indices, self.codebook_size)
            self.cluster_size.data.mul_(self.decay).add_(count.to(self.cluster_size.dtype), alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(total.to(self.embed_avg.dtype), alpha=1 - self.decay)
            size = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.epsilon) / (size + self.codebook_size * self.epsilon) * size
            self.embed.data.copy_(self.embed_avg / smoothed.unsqueeze(1))
        return quantize, embed_ind


def kmeans(samples: Tensor, num_clusters: int, num_iters: int = 10) -> tuple[Tensor, Tensor]:
    """encodec's k-means, with its draws from torch's random numbers: means ``[K, d]`` and their counts ``[K]``."""
    samples = samples.detach()
    if samples.shape[0] >= num_clusters:
        chosen = torch.randperm(samples.shape[0], device=samples.device)[:num_clusters]
    else:
        chosen = torch.randint(0, samples.shape[0], (num_clusters,), device=samples.device)
    means = samples[chosen]
    for _ in range(num_iters):
        indices = nearest(samples, means)
        count = count_choices(indices, num_clusters)
        moved = (_sum(samples, indices, num_clusters) / count.clamp(min=1)[:, None]).to(samples.dtype)
        means = torch.where((count == 0)[:, None], means, moved)
    return means, count


def _with_search(init_embed_: FunctionType) -> FunctionType:
    """The original's ``init_embed_`` (forks share the codes among processes, each in its way) with our k-means."""
    names = {**init_embed_.__globals__, "kmeans": kmeans}
    return FunctionType(init_embed_.__code__, names, init_embed_.__name__, init_embed_.__defaults__)


def _sum(rows: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """The sum of the rows ``[N, d]`` that chose each code: float32 ``[K, d]``, or float64 of float64."""
    rows = rows.detach()
    if rows.dtype == torch.float64:
        return rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, indices, rows)
    return segment_sum(rows[:, None], indices[:, None], num_codes)[0]


def _unfit_frozen(module: nn.Module) -> str | None:
    return _wrong_shape("embed", module.embed, module.codebook_size)


def _unfit_mimi(module: nn.Module) -> str | None:
    if tuple(module.cluster_usage.shape) != (module.codebook_size,):
        return f"cluster_usage is {tuple(module.cluster_usage.shape)}, expected [{module.codebook_size}]"
    return _wrong_shape("embed_sum", module.embed_sum, module.codebook_size)


def _unfit_averaged(module: nn.Module) -> str | None:
    for name in ("embed", "embed_avg"):
        if reason := _wrong_shape(name, getattr(module, name), module.codebook_size):
            return reason
    held = (
        "inited",
        "cluster_size",
        "decay",
        "epsilon",
        "expire_codes_",
        "preprocess",
        "postprocess_emb",
        "dequantize",
    )
    if missing := [name for name in held if not hasattr(module, name)]:
        return f"it has no {', '.join(missing)}"
    if "kmeans" not in module.init_embed_.__code__.co_names:
        return "its init_embed_ calls no function 'kmeans'"
    expected, found = (
        list(inspect.signature(f).parameters) for f in (kmeans, module.init_embed_.__globals__["kmeans"])
    )
    return None if found == expected else f"its kmeans takes ({', '.join(found)}); known is ({', '.join(expected)})"


def _wrong_shape(name: str, table: Tensor, num_codes: int) -> str | None:
    right = table.dim() == 2 and table.shape[0] == num_codes
    return None if right else f"{name} is {tuple(table.shape)}, expected [{num_codes}, d]"


def _calls_frozen(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("encode", (vectors(module.embed, 2, 32, module.embed.shape[1]),))]


def _calls_mimi(module: nn.Module, vectors: Vectors) -> list[Call]:
    codes = module.embed_sum / module.cluster_usage.clamp(min=module.epsilon)[:, None]  # module.embed would be kept
    return [Call("encode", (vectors(codes, 2, 32, codes.shape[1]),))]


def _calls_averaged(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call(method, (vectors(module.embed, 2, 32, module.embed.shape[1]),)) for method in ("encode", "forward")]


_FROZEN = (
    "transformers.models.encodec.modeling_encodec.EncodecEuclideanCodebook",
    "transformers.models.xcodec.modeling_xcodec.XcodecEuclideanCodebook",
    "transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer.HiggsAudioV2TokenizerEuclideanCodebook",
)
_MIMI = ("transformers.models.mimi.modeling_mimi.MimiEuclideanCodebook",)

FAMILIES = (
    Family("transformers EnCodec, X-Codec, Higgs Audio", _FROZEN, _Frozen, _unfit_frozen, _calls_frozen),
    Family("transformers Mimi", _MIMI, _Mimi, _unfit_mimi, _calls_mimi),
    Family("encodec", ("*.EuclideanCodebook",), _Averaged, _unfit_averaged, _calls_averaged),
)
