"""vector-quantize-pytorch's quantizers."""

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.drop_in.case import DropInCase

_K, _N = 16384, 4096
_NAMES = {"SimVQ": "vector-quantize-pytorch SimVQ"}  # the repository SimVQ has a class of that name


def _quantizer(kind: str, d: int, **options: Any) -> nn.Module:
    """A quantizer of the package whose codes are normal vectors, of norm 1 for the cosine."""
    import vector_quantize_pytorch as package

    module = getattr(package, kind)(dim=d, codebook_size=_K, **options)
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


def _vectors(d: int) -> tuple[torch.Tensor]:
    return (torch.randn(4, _N // 4, d, generator=torch.Generator().manual_seed(1)).requires_grad_(),)


def _case(kind: str, d: int, note: str = "", **options: Any) -> DropInCase:
    family = f"vector-quantize-pytorch {'SimVQ' if kind == 'SimVQ' else 'Codebook'}"
    return DropInCase(
        family, f"{_NAMES.get(kind, kind)}{note}", d, partial(_quantizer, kind, d, **options), partial(_vectors, d)
    )


CASES: tuple[DropInCase, ...] = (
    _case("VectorQuantize", 8),
    _case("VectorQuantize", 256, ", wide"),
    _case("VectorQuantize", 16, ", cosine", use_cosine_sim=True),
    _case("VectorQuantize", 8, ", learned", learnable_codebook=True, ema_update=False),
    _case("ResidualVQ", 128, ", 4 stages", num_quantizers=4),
    _case("SimVQ", 8),
)
