"""The third-party quantizers of the drop-in table, each with a codebook of normal vectors and fixed inputs.

This file and `benchmarks.drop_in` import one room of the tests: tests/third_party_quantizers restates the classes of
repositories that are no packages.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.third_party_quantizers import dac, ibq, llamagen, maskbit, maskgit_vqgan, simvq, taming, titok, unitok, var
from tests.third_party_quantizers.without_torchaudio import imported

CODES, VECTORS = 16_384, 4096
SIDE = 64
"""Positions along a side of an image: SIDE * SIDE = VECTORS."""


@dataclass(frozen=True)
class DropInCase:
    """A quantizer at the table's size, 4,096 vectors against 16,384 codes unless it says otherwise.

    Attributes:
        family: the family's name in `revq_kernels.interop`.
        quantizer: the class and its package; unique, since rows are found by it.
        d: code dimension.
        build: makes the module, with a codebook of K normal vectors; the package's own class if it is installed.
        inputs: the arguments of a call with N vectors, from a fixed seed.
        method: the method that is timed.
        trains: whether the family trains; if so, forward + backward in training mode has a row too.
        codes: K.
        vectors: N.
    """

    family: str
    quantizer: str
    d: int
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    method: str = "forward"
    trains: bool = True
    codes: int = CODES
    vectors: int = VECTORS


def _codes(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _normal(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)


# Image quantizers around ``embedding.weight``: the packages' own classes, and restated ones


def _normal_table(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with a table of normal elements: a trained table has about the spread of its latents."""
    module = build()
    with torch.no_grad():
        module.embedding.weight.copy_(_codes(*module.embedding.weight.shape))
    return module


def _images(d: int, *more: Any) -> tuple[Any, ...]:
    return *_normal(1, d, SIDE, SIDE), *more


def _sequences(d: int) -> tuple[Tensor]:
    return (_images(d)[0].flatten(2),)


def _videos(d: int) -> tuple[Tensor]:
    return _normal(1, 4, d, SIDE // 2, SIDE // 2)


def _images_with_loss(d: int) -> tuple[Any, ...]:
    return _images(d, True)


def _transformers(kind: str, d: int) -> nn.Module:
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEVectorQuantizer
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAEVectorQuantizer
    from transformers.models.glm_image.modeling_glm_image import GlmImageVQVAEVectorQuantizer
    from transformers.models.janus.modeling_janus import JanusVQVAEVectorQuantizer

    classes = {
        "Chameleon": ChameleonVQVAEVectorQuantizer,
        "Janus": JanusVQVAEVectorQuantizer,
        "GLM-Image": GlmImageVQVAEVectorQuantizer,
        "Emu3": Emu3VQVAEVectorQuantizer,
    }
    sizes = {"num_embeddings": CODES, "codebook_size": CODES, "embed_dim": d, "num_patches": SIDE}
    return classes[kind](SimpleNamespace(**sizes))


def _diffusers(d: int) -> nn.Module:
    from diffusers.models.autoencoders.vae import VectorQuantizer

    return VectorQuantizer(CODES, d, beta=0.25)


def _table(family: str, quantizer: str, d: int, build: Callable[[], nn.Module], inputs: Any, **more: Any) -> DropInCase:
    build, inputs = functools.partial(_normal_table, build), functools.partial(inputs, d)
    return DropInCase(family, quantizer, d, build, inputs, **more)


def _restated(family: str, quantizer: str, kind: type, d: int, inputs: Any = _images, **options: Any) -> DropInCase:
    return _table(family, quantizer, d, functools.partial(kind, CODES, d, 0.25, **options), inputs)


_CHAMELEON, _TAMING, _TITOK = "transformers Chameleon, Janus", "taming, IBQ VectorQuantizer2", "TiTok VectorQuantizer"
_TITOK_CLUSTERING = {"use_l2_norm": True, "clustering_vq": True}
IMAGES = (
    _table("diffusers VectorQuantizer", "diffusers VectorQuantizer", 4, lambda: _diffusers(4), _images),
    _table(_CHAMELEON, "transformers Janus", 8, lambda: _transformers("Janus", 8), _images),
    _table(_CHAMELEON, "transformers Chameleon", 256, lambda: _transformers("Chameleon", 256), _images),
    _table("transformers GLM-Image", "transformers GLM-Image", 256, lambda: _transformers("GLM-Image", 256), _images),
    _table("transformers Emu3", "transformers Emu3", 4, lambda: _transformers("Emu3", 4), _videos, trains=False),
    _restated(_TAMING, "taming VectorQuantizer2", taming.VectorQuantizer2, 4),
    _restated(_TAMING, "taming VectorQuantizer2, wide", taming.VectorQuantizer2, 256),
    _restated(_TAMING, "IBQ VectorQuantizer2, l2_normalize", ibq.VectorQuantizer2, 256, l2_normalize=True),
    _restated("SimVQ", "SimVQ", simvq.SimVQ, 128),
    _restated("SimVQ1D", "SimVQ1D", simvq.SimVQ1D, 128, _sequences),
    _restated(_TITOK, "TiTok VectorQuantizer, use_l2_norm", titok.VectorQuantizer, 12, use_l2_norm=True),
    _restated(_TITOK, "TiTok VectorQuantizer, clustering_vq", titok.VectorQuantizer, 12, **_TITOK_CLUSTERING),
    _restated("MaskBit SimpleVectorizer", "MaskBit SimpleVectorizer", maskbit.SimpleVectorizer, 256),
    _restated(
        "MaskGIT VectorQuantizer", "MaskGIT VectorQuantizer", maskgit_vqgan.VectorQuantizer, 256, _images_with_loss
    ),
)


# Quantizers of tokenizers for image generation, restated


def _llamagen(entropy_loss_ratio: float) -> nn.Module:
    torch.manual_seed(0)
    quantizer = llamagen.VectorQuantizer(CODES, 8, 0.25, entropy_loss_ratio, l2_norm=True, show_usage=False)
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def _var() -> nn.Module:
    torch.manual_seed(0)
    return var.VectorQuantizer2(CODES, 32, using_znorm=True, v_patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


def _unitok() -> nn.Module:
    torch.manual_seed(0)
    return unitok.VectorQuantizerM(8 * CODES, 64, num_codebooks=8)


def _var_inputs() -> tuple[Any, ...]:
    return *_normal(6, 32, 16, 16), False


def _llamagen_inputs() -> tuple[Tensor]:
    return _normal(4, 8, 32, 32)


_VAR = "VAR VectorQuantizer2, 6 images (4,080 tokens)"
GENERATION = (
    DropInCase("LlamaGen", "LlamaGen VectorQuantizer", 8, lambda: _llamagen(0.0), _llamagen_inputs),
    DropInCase("LlamaGen", "LlamaGen VectorQuantizer, entropy loss", 8, lambda: _llamagen(0.1), _llamagen_inputs),
    DropInCase("VAR", _VAR, 32, _var, _var_inputs, method="f_to_idxBl_or_fhat", trains=False),
    DropInCase("UniTok", "UniTok VectorQuantizerM, 8 codebooks", 8, _unitok, lambda: _normal(16, 256, 64)),
)


# vector-quantize-pytorch


def _lucidrains(kind: str, d: int, **options: Any) -> nn.Module:
    """A quantizer of the package whose codes are normal vectors, normalized for the cosine."""
    import vector_quantize_pytorch as package

    module = getattr(package, kind)(dim=d, codebook_size=CODES, **options)
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if hasattr(part, "embed"):
            codes = torch.randn(part.embed.shape, generator=generator)
            codes = nn.functional.normalize(codes, dim=-1) if part.use_cosine_sim else codes
            part.embed.data.copy_(codes)
            part.embed_avg.data.copy_(codes)
        if hasattr(part, "frozen_codebook"):
            part.frozen_codebook.copy_(torch.randn(part.frozen_codebook.shape, generator=generator))
    return module


def _sequences_with_grad(d: int) -> tuple[Tensor]:
    return (_normal(4, VECTORS // 4, d)[0].requires_grad_(),)


_NAMES = {"SimVQ": "vector-quantize-pytorch SimVQ"}  # another repository has a class SimVQ


def _lucidrains_case(kind: str, d: int, note: str = "", **options: Any) -> DropInCase:
    family = f"vector-quantize-pytorch {'SimVQ' if kind == 'SimVQ' else 'Codebook'}"
    build, inputs = functools.partial(_lucidrains, kind, d, **options), functools.partial(_sequences_with_grad, d)
    return DropInCase(family, f"{_NAMES.get(kind, kind)}{note}", d, build, inputs)


LUCIDRAINS = (
    _lucidrains_case("VectorQuantize", 8),
    _lucidrains_case("VectorQuantize", 256, ", wide"),
    _lucidrains_case("VectorQuantize", 16, ", cosine", use_cosine_sim=True),
    _lucidrains_case("VectorQuantize", 8, ", learned", learnable_codebook=True, ema_update=False),
    _lucidrains_case("ResidualVQ", 128, ", 4 stages", num_quantizers=4),
    _lucidrains_case("SimVQ", 8),
)


# Audio codebooks, each at the d of its codec


def _buffers(module: nn.Module, d: int, **buffers: Tensor) -> nn.Module:
    for name, value in {"embed": _codes(CODES, d), **buffers}.items():
        getattr(module, name).copy_(value)
    return module.eval()


def _encodec_frozen() -> nn.Module:
    from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook

    return _buffers(EncodecEuclideanCodebook(SimpleNamespace(codebook_size=CODES, codebook_dim=128)), 128)


def _xcodec() -> nn.Module:
    from transformers.models.xcodec.modeling_xcodec import XcodecEuclideanCodebook

    return _buffers(XcodecEuclideanCodebook(SimpleNamespace(codebook_size=CODES, codebook_dim=1024)), 1024)


def _higgs() -> nn.Module:
    import transformers  # noqa: F401 - it looks for torchaudio, and must do so before `imported` replaces it

    home = imported("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    sizes = SimpleNamespace(codebook_size=CODES, codebook_dim=64)
    return _buffers(home.HiggsAudioV2TokenizerEuclideanCodebook(sizes), 64)


def _mimi() -> nn.Module:
    from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook

    module = MimiEuclideanCodebook(SimpleNamespace(codebook_size=CODES, codebook_dim=256))
    module.embed_sum.copy_(_codes(CODES, 256))
    return module.eval()


def _transformers_dac() -> nn.Module:
    from transformers.models.dac.modeling_dac import DacVectorQuantize

    torch.manual_seed(0)
    return DacVectorQuantize(SimpleNamespace(codebook_size=CODES, codebook_dim=8, hidden_size=64))


def _encodec() -> nn.Module:
    module = imported("encodec.quantization.core_vq").EuclideanCodebook(128, CODES)
    module.cluster_size.fill_(1.0)  # from a size of zero, the first moving average gives codes of 1e5
    return _buffers(module, 128, embed_avg=_codes(CODES, 128))


def _dac() -> nn.Module:
    torch.manual_seed(0)
    return dac.VectorQuantize(input_dim=64, codebook_size=CODES, codebook_dim=8)


def _rows(d: int) -> Callable[[], tuple[Tensor]]:
    return lambda: _normal(4, VECTORS // 4, d)


def _channels(channels: int) -> Callable[[], tuple[Tensor]]:
    return lambda: _normal(4, channels, VECTORS // 4)


_FROZEN, _TRANSFORMERS_DAC = "transformers EnCodec, X-Codec, Higgs Audio", "transformers DacVectorQuantize"
_HIGGS, _MIMI = "transformers HiggsAudioV2TokenizerEuclideanCodebook", "transformers MimiEuclideanCodebook"
AUDIO = (
    DropInCase(_FROZEN, "transformers EncodecEuclideanCodebook", 128, _encodec_frozen, _rows(128), "encode", False),
    DropInCase(_FROZEN, "transformers XcodecEuclideanCodebook", 1024, _xcodec, _rows(1024), "encode", False),
    DropInCase(_FROZEN, _HIGGS, 64, _higgs, _rows(64), "encode", False),
    DropInCase("transformers Mimi", _MIMI, 256, _mimi, _rows(256), "encode", False),
    DropInCase("encodec", "encodec EuclideanCodebook", 128, _encodec, _rows(128)),
    DropInCase("transformers DAC", _TRANSFORMERS_DAC, 8, _transformers_dac, _channels(64)),
    DropInCase("descript-audio-codec", "descript-audio-codec VectorQuantize", 8, _dac, _channels(64)),
)

CASES: dict[str, DropInCase] = {case.quantizer: case for case in (*IMAGES, *GENERATION, *LUCIDRAINS, *AUDIO)}
