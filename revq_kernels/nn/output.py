"""What a quantizer hands back: its own triple, or the tuple that another library's training code unpacks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class QuantizerOutput(NamedTuple):
    """What a quantizer returns: the input's latents quantized, their indices, and a loss to minimize."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class Parts(NamedTuple):
    """Everything a call computed, from which a return format takes what it wants."""

    quantized: Tensor
    """In x's shape and dtype."""
    indices: Tensor
    """int64 ``[B, T]``; -1 where masked."""
    loss: Tensor
    """float32 scalar: the two losses, weighted."""
    codebook_loss: Tensor
    """float32 scalar, without a weight."""
    commitment_loss: Tensor
    """float32 scalar, without a weight."""
    weights: tuple[float, float]
    """Of the codebook and the commitment loss in ``loss``."""
    x: Tensor
    """The input."""
    indices_by_position: Tensor
    """The indices in the shape of x's positions: ``[B, H, W]`` for images of one token each, ``[B, L, pieces]``, ..."""


Returns = Callable[[Parts, nn.Module], Any]
"""A format: a function of the parts and of the `FastChannelVQ` that made them."""


def own(parts: Parts, vq: nn.Module) -> QuantizerOutput:
    """The default."""
    return QuantizerOutput(parts.quantized, parts.indices, parts.loss)


def taming(parts: Parts, vq: nn.Module) -> tuple[Any, ...]:
    """VQGAN's ``VectorQuantizer2`` (taming, IBQ) and diffusers' ``VectorQuantizer``; they give None for the perplexity too."""
    return parts.quantized, parts.loss, (None, None, parts.indices.reshape(-1))


def transformers(parts: Parts, vq: nn.Module) -> tuple[Any, ...]:
    """Chameleon's, Janus' and GlmImage's ``VQVAEVectorQuantizer``."""
    return parts.quantized, parts.loss, parts.indices.reshape(-1)


def llamagen(parts: Parts, vq: nn.Module) -> tuple[Any, ...]:
    """LlamaGen's ``VectorQuantizer`` with entropy_loss_ratio=0: no losses in eval mode.

    The usage is this module's `utilization`, since the last reset; LlamaGen's is that of the last 65,536 tokens.
    """
    losses: tuple[Any, ...] = (None, None, None, None)
    if vq.training:
        nothing = torch.zeros_like(parts.loss)
        losses = (*_weighted(parts), nothing, vq.utilization.mean())
    return parts.quantized, losses, (None, None, parts.indices.reshape(-1))


def titok(parts: Parts, vq: nn.Module) -> tuple[Any, ...]:
    """TiTok's and MaskBit's ``VectorQuantizer``."""
    codebook_loss, commitment_loss = _weighted(parts)
    return parts.quantized, {
        "quantizer_loss": parts.loss,
        "commitment_loss": commitment_loss,
        "codebook_loss": codebook_loss,
        "min_encoding_indices": parts.indices_by_position,
    }


def lucidrains(parts: Parts, vq: nn.Module) -> tuple[Any, ...]:
    """vector-quantize-pytorch's ``VectorQuantize``."""
    return parts.quantized, parts.indices_by_position, parts.loss


def dac(parts: Parts, vq: nn.Module) -> tuple[Any, ...]:
    """transformers' ``DacVectorQuantize``; descript's own gives each sample's losses, of which these are the means."""
    return parts.quantized, parts.commitment_loss, parts.codebook_loss, parts.indices, parts.x


def _weighted(parts: Parts) -> tuple[Tensor, Tensor]:
    return parts.weights[0] * parts.codebook_loss, parts.weights[1] * parts.commitment_loss


FORMATS: dict[str, Returns] = {f.__name__: f for f in (own, taming, transformers, llamagen, titok, lucidrains, dac)}


def format_of(returns: str | Returns) -> Returns:
    """The function that ``returns`` names or is.

    Raises:
        ValueError: for an unknown name.
    """
    if callable(returns):
        return returns
    if returns not in FORMATS:
        raise ValueError(f"returns: expected a function or one of {tuple(FORMATS)}, got {returns!r}")
    return FORMATS[returns]
