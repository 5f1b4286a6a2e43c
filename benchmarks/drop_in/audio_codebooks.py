"""Audio codebooks, each at its own d."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.drop_in.case import DropInCase

_VECTORS = 4096
_CODES = 16384


def imported(name: str) -> ModuleType:
    """A module that imports torchaudio for work beside the quantizer; where that is missing, an empty one stands in."""
    missing = "torchaudio" not in sys.modules and importlib.util.find_spec("torchaudio") is None
    if missing:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        return importlib.import_module(name)
    finally:
        if missing:
            del sys.modules["torchaudio"]


def _codebook(module: nn.Module, d: int, **buffers: Tensor) -> nn.Module:
    for name, value in {"embed": _normal(_CODES, d), **buffers}.items():
        getattr(module, name).copy_(value)
    return module.eval()


def _encodec_frozen() -> nn.Module:
    from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook

    return _codebook(EncodecEuclideanCodebook(SimpleNamespace(codebook_size=_CODES, codebook_dim=128)), 128)


def _xcodec() -> nn.Module:
    from transformers.models.xcodec.modeling_xcodec import XcodecEuclideanCodebook

    return _codebook(XcodecEuclideanCodebook(SimpleNamespace(codebook_size=_CODES, codebook_dim=1024)), 1024)


def _higgs() -> nn.Module:
    import transformers  # noqa: F401 - asks whether there is a torchaudio, before `imported` pretends it

    home = imported("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    sizes = SimpleNamespace(codebook_size=_CODES, codebook_dim=64)
    return _codebook(home.HiggsAudioV2TokenizerEuclideanCodebook(sizes), 64)


def _mimi() -> nn.Module:
    from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook

    module = MimiEuclideanCodebook(SimpleNamespace(codebook_size=_CODES, codebook_dim=256))
    module.embed_sum.copy_(_normal(_CODES, 256))
    return module.eval()


def _transformers_dac() -> nn.Module:
    from transformers.models.dac.modeling_dac import DacVectorQuantize

    torch.manual_seed(0)
    return DacVectorQuantize(SimpleNamespace(codebook_size=_CODES, codebook_dim=8, hidden_size=64))


def _encodec() -> nn.Module:
    module = imported("encodec.quantization.core_vq").EuclideanCodebook(128, _CODES)
    module.cluster_size.fill_(1.0)  # of zero, the first average makes codes of 1e5
    return _codebook(module, 128, embed_avg=_normal(_CODES, 128))


def _dac() -> nn.Module:
    from tests.third_party_quantizers.dac import VectorQuantize

    torch.manual_seed(0)
    return VectorQuantize(input_dim=64, codebook_size=_CODES, codebook_dim=8)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _rows(d: int) -> tuple[Tensor]:
    return (torch.randn(4, _VECTORS // 4, d, generator=torch.Generator().manual_seed(1)),)


def _channels(channels: int) -> tuple[Tensor]:
    return (torch.randn(4, channels, _VECTORS // 4, generator=torch.Generator().manual_seed(1)),)


_FROZEN = "transformers EnCodec, X-Codec, Higgs Audio"

CASES: tuple[DropInCase, ...] = (
    DropInCase(
        _FROZEN, "transformers EncodecEuclideanCodebook", 128, _encodec_frozen, lambda: _rows(128), "encode", False
    ),
    DropInCase(_FROZEN, "transformers XcodecEuclideanCodebook", 1024, _xcodec, lambda: _rows(1024), "encode", False),
    DropInCase(
        _FROZEN, "transformers HiggsAudioV2TokenizerEuclideanCodebook", 64, _higgs, lambda: _rows(64), "encode", False
    ),
    DropInCase(
        "transformers Mimi", "transformers MimiEuclideanCodebook", 256, _mimi, lambda: _rows(256), "encode", False
    ),
    DropInCase("encodec", "encodec EuclideanCodebook", 128, _encodec, lambda: _rows(128)),
    DropInCase("transformers DAC", "transformers DacVectorQuantize", 8, _transformers_dac, lambda: _channels(64)),
    DropInCase("descript-audio-codec", "descript-audio-codec VectorQuantize", 8, _dac, lambda: _channels(64)),
)
