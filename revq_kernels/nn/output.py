"""What a quantizer returns: a triple by default, or everything that a call computed, for another format."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class QuantizerOutput(NamedTuple):
    """The default result of a quantizer."""

    quantized: Tensor
    """The input's latents or tokens, quantized."""
    indices: Tensor
    """int64 ``[B, T]``; -1 where masked."""
    loss: Tensor
    """float32 scalar to minimize."""


class QuantizerDetails(NamedTuple):
    """Everything that a call computed; an output format takes from it what it needs."""

    quantized: Tensor
    """The quantized values, in x's shape and dtype."""
    indices: Tensor
    """int64 ``[B, T]``; -1 where masked."""
    loss: Tensor
    """float32 scalar: the two losses, weighted."""
    codebook_loss: Tensor
    """float32 scalar, without a weight."""
    commitment_loss: Tensor
    """float32 scalar, without a weight."""
    weights: tuple[float, float]
    """The weights of the codebook loss and of the commitment loss in ``loss``."""
    x: Tensor
    """The input."""
    indices_by_position: Tensor
    """The indices in the shape of x's positions: ``[B, H, W]`` for images of one token each, ``[B, L, pieces]``, ..."""


OutputFormat = Callable[[QuantizerDetails, Any], Any]
"""A function of the details and of the `FastChannelVQ` that computed them.

`revq_kernels.interop.formats` holds the tuples that the training code of other libraries unpacks.
"""


def default_format(details: QuantizerDetails, quantizer: nn.Module) -> QuantizerOutput:
    """``(quantized, indices, loss)``."""
    return QuantizerOutput(details.quantized, details.indices, details.loss)
