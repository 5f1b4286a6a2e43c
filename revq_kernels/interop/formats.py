"""The tuples that other libraries' training code unpacks, as output formats of `FastChannelVQ`.

``FastChannelVQ(..., output_format=formats.taming)`` returns what taming-transformers' quantizer returns, and so on.
"""

from typing import Any

import torch
from torch import Tensor

from revq_kernels.nn.channel_vq import FastChannelVQ
from revq_kernels.nn.output import QuantizerDetails


def taming(details: QuantizerDetails, quantizer: FastChannelVQ) -> tuple[Any, ...]:
    """``VectorQuantizer2`` of VQGAN (taming, IBQ) and diffusers' ``VectorQuantizer``; their perplexity is None, too."""
    return details.quantized, details.loss, (None, None, details.indices.reshape(-1))


def transformers(details: QuantizerDetails, quantizer: FastChannelVQ) -> tuple[Any, ...]:
    """``VQVAEVectorQuantizer`` of Chameleon, Janus and GlmImage."""
    return details.quantized, details.loss, details.indices.reshape(-1)


def llamagen(details: QuantizerDetails, quantizer: FastChannelVQ) -> tuple[Any, ...]:
    """LlamaGen's ``VectorQuantizer`` with entropy_loss_ratio=0: no losses in eval mode.

    The codebook usage is this module's `utilization`, since the last reset; LlamaGen's is that of the last 65,536 tokens.
    """
    losses: tuple[Any, ...] = (None, None, None, None)
    if quantizer.training:
        no_entropy_loss = torch.zeros_like(details.loss)
        losses = (*_weighted(details), no_entropy_loss, quantizer.utilization.mean())
    return details.quantized, losses, (None, None, details.indices.reshape(-1))


def titok(details: QuantizerDetails, quantizer: FastChannelVQ) -> tuple[Any, ...]:
    """``VectorQuantizer`` of TiTok and MaskBit."""
    codebook_loss, commitment_loss = _weighted(details)
    return details.quantized, {
        "quantizer_loss": details.loss,
        "commitment_loss": commitment_loss,
        "codebook_loss": codebook_loss,
        "min_encoding_indices": details.indices_by_position,
    }


def lucidrains(details: QuantizerDetails, quantizer: FastChannelVQ) -> tuple[Any, ...]:
    """``VectorQuantize`` of vector-quantize-pytorch."""
    return details.quantized, details.indices_by_position, details.loss


def dac(details: QuantizerDetails, quantizer: FastChannelVQ) -> tuple[Any, ...]:
    """transformers' ``DacVectorQuantize``; descript's own class returns each sample's losses, of which these are the means."""
    return details.quantized, details.commitment_loss, details.codebook_loss, details.indices, details.x


def _weighted(details: QuantizerDetails) -> tuple[Tensor, Tensor]:
    return details.weights[0] * details.codebook_loss, details.weights[1] * details.commitment_loss
