"""Quantizers of tokenizers for image generation: LlamaGen, VAR and UniTok, re-stated."""

import torch
from torch import Tensor, nn

from benchmarks.drop_in.case import DropInCase
from tests.third_party_quantizers import llamagen, unitok, var

_K = 16384


def _normal(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)


def _llamagen(ratio: float) -> nn.Module:
    torch.manual_seed(0)
    quantizer = llamagen.VectorQuantizer(_K, 8, 0.25, ratio, l2_norm=True, show_usage=False)
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def _var() -> nn.Module:
    torch.manual_seed(0)
    return var.VectorQuantizer2(_K, 32, using_znorm=True, v_patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


def _unitok() -> nn.Module:
    torch.manual_seed(0)
    return unitok.VectorQuantizerM(8 * _K, 64, num_codebooks=8)


CASES: tuple[DropInCase, ...] = (
    DropInCase("LlamaGen", "LlamaGen VectorQuantizer", 8, lambda: _llamagen(0.0), lambda: _normal(4, 8, 32, 32)),
    DropInCase(
        "LlamaGen", "LlamaGen VectorQuantizer, entropy loss", 8, lambda: _llamagen(0.1), lambda: _normal(4, 8, 32, 32)
    ),
    DropInCase(
        "VAR",
        "VAR VectorQuantizer2, 6 images (4,080 tokens)",
        32,
        _var,
        lambda: (*_normal(6, 32, 16, 16), False),
        method="f_to_idxBl_or_fhat",
        trains=False,
    ),
    DropInCase("UniTok", "UniTok VectorQuantizerM, 8 codebooks", 8, _unitok, lambda: _normal(16, 256, 64)),
)
