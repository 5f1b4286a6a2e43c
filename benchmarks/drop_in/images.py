"""Rows for image quantizers around ``embedding.weight``: packages' own classes, and re-stated ones."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.drop_in.case import DropInCase
from tests.third_party_quantizers import ibq, maskbit, maskgit_vqgan, simvq, taming, titok

_CODES, _SIDE = 16_384, 64


def _normal(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with a table of normal numbers, as wide as a trained one is beside its latents."""
    module = build()
    with torch.no_grad():
        module.embedding.weight.copy_(torch.randn(module.embedding.weight.shape, generator=_seeded()))
    return module


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _images(d: int, *more: Any) -> tuple[Tensor, ...]:
    return torch.randn(1, d, _SIDE, _SIDE, generator=_seeded().manual_seed(1)), *more


def _sequences(d: int) -> tuple[Tensor]:
    return (_images(d)[0].flatten(2),)


def _videos(d: int) -> tuple[Tensor]:
    return (torch.randn(1, 4, d, _SIDE // 2, _SIDE // 2, generator=_seeded().manual_seed(1)),)


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
    sizes = {"num_embeddings": _CODES, "codebook_size": _CODES, "embed_dim": d, "num_patches": _SIDE}
    return classes[kind](SimpleNamespace(**sizes))


def _diffusers(d: int) -> nn.Module:
    from diffusers.models.autoencoders.vae import VectorQuantizer

    return VectorQuantizer(_CODES, d, beta=0.25)


def _case(family: str, quantizer: str, d: int, build: Callable[[], nn.Module], inputs: Any, **more: Any) -> DropInCase:
    return DropInCase(family, quantizer, d, functools.partial(_normal, build), functools.partial(inputs, d), **more)


def _restated(family: str, quantizer: str, kind: type, d: int, inputs: Any = _images, **options: Any) -> DropInCase:
    build = functools.partial(kind, _CODES, d, 0.25, **options)
    return _case(family, quantizer, d, build, inputs)


def _with_loss(d: int) -> tuple[Any, ...]:
    return _images(d, True)


_CHAMELEON, _TAMING = "transformers Chameleon, Janus", "taming, IBQ VectorQuantizer2"

CASES: tuple[DropInCase, ...] = (
    _case("diffusers VectorQuantizer", "diffusers VectorQuantizer", 4, lambda: _diffusers(4), _images),
    _case(_CHAMELEON, "transformers Janus", 8, lambda: _transformers("Janus", 8), _images),
    _case(_CHAMELEON, "transformers Chameleon", 256, lambda: _transformers("Chameleon", 256), _images),
    _case("transformers GLM-Image", "transformers GLM-Image", 256, lambda: _transformers("GLM-Image", 256), _images),
    _case("transformers Emu3", "transformers Emu3", 4, lambda: _transformers("Emu3", 4), _videos, trains=False),
    _restated(_TAMING, "taming VectorQuantizer2", taming.VectorQuantizer2, 4),
    _restated(_TAMING, "taming VectorQuantizer2, wide", taming.VectorQuantizer2, 256),
    _restated(_TAMING, "IBQ VectorQuantizer2, l2_normalize", ibq.VectorQuantizer2, 256, l2_normalize=True),
    _restated("SimVQ", "SimVQ", simvq.SimVQ, 128),
    _restated("SimVQ1D", "SimVQ1D", simvq.SimVQ1D, 128, _sequences),
    _restated(
        "TiTok VectorQuantizer", "TiTok VectorQuantizer, use_l2_norm", titok.VectorQuantizer, 12, use_l2_norm=True
    ),
    _restated(
        "TiTok VectorQuantizer",
        "TiTok VectorQuantizer, clustering_vq",
        titok.VectorQuantizer,
        12,
        use_l2_norm=True,
        clustering_vq=True,
    ),
    _restated("MaskBit SimpleVectorizer", "MaskBit SimpleVectorizer", maskbit.SimpleVectorizer, 256),
    _restated("MaskGIT VectorQuantizer", "MaskGIT VectorQuantizer", maskgit_vqgan.VectorQuantizer, 256, _with_loss),
)
