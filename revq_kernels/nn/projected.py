"""Codes of fewer numbers than the latent has channels."""

from typing import Any

import torch
from torch import Tensor, nn

from revq_kernels.nn.arrange import Arrangement
from revq_kernels.nn.channel_vq import FastChannelVQ
from revq_kernels.nn.layout import CHANNEL_AXIS
from revq_kernels.nn.output import Parts


class ProjectedVQ(nn.Module):
    """A linear map in, a `FastChannelVQ` of low dimension, a linear map out (Yu et al. 2022, "factorized codes"; DAC).

    The loss compares the projected latents with their codes; the maps get the gradient of the decoder through the
    quantizer's estimator.  The result has the form that ``vq`` returns, with the quantized latents mapped out.

    Args:
        dim: channels of the latents, at the axis of ``vq``'s layout (its last for tokens).
        vq: the quantizer.
        inner: channels that it sees; its code_dim if None.

    Attributes:
        project_in, project_out: ``nn.Linear``, dim to inner and back.
    """

    def __init__(self, dim: int, vq: FastChannelVQ, *, inner: int | None = None) -> None:
        super().__init__()
        inner = vq.code_dim if inner is None else inner
        self.project_in, self.vq, self.project_out = nn.Linear(dim, inner), vq, nn.Linear(inner, dim)

    @property
    def arrangement(self) -> Arrangement:
        """That of ``vq``."""
        return self.vq.arrangement

    def forward(self, x: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None) -> Any:
        """As `FastChannelVQ.forward`, for latents of ``dim`` channels; a masked position keeps its own value."""
        return self.vq.returns(self.parts(x, mask=mask, lengths=lengths), self.vq)

    def parts(self, x: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None) -> Parts:
        """As `forward`, before the return format; ``parts.x`` is the projected input."""
        shape = list(x.shape)
        shape[self._axis(x.dim())] = self.project_in.out_features
        tokens = self.arrangement.mask(x.new_empty(shape, device="meta"), mask, lengths)
        if tokens is None:
            parts = self.vq.parts(self._map(self.project_in, x))
            return parts._replace(quantized=self._map(self.project_out, parts.quantized))
        counts = self._over_channels(tokens, tuple(shape[1:]))
        # zeros, as the gradient of a linear map would carry a padding of NaN into its weights
        parts = self.vq.parts(self._map(self.project_in, torch.where(counts, x, 0)), mask=mask, lengths=lengths)
        quantized = self._map(self.project_out, parts.quantized)
        return parts._replace(quantized=torch.where(counts, quantized, x))

    def encode(self, x: Tensor) -> Tensor:
        """The indices int64 ``[B, T]`` of ``x``; counts nothing."""
        return self.vq.encode(self._map(self.project_in, x))

    def decode(self, indices: Tensor, latent_shape: tuple[int, ...] | None = None) -> Tensor:
        """What ``indices`` int64 ``[B, T]`` stand for, zeros for -1: ``[B, *latent_shape]``.

        Without a shape: ``[B, T, dim]``, where the quantizer takes tokens.
        """
        if latent_shape is None:
            return self.project_out(self._codes(indices)).masked_fill((indices == -1)[..., None], 0)
        inner = list(latent_shape)
        inner[self._axis(len(inner) + 1) - 1] = self.project_in.out_features
        latents = self._map(self.project_out, self._codes(indices, tuple(inner)))
        return latents.masked_fill(self._over_channels(indices == -1, tuple(inner)), 0)

    def initialize_(self, x: Tensor, **options: Any) -> None:
        """As `FastChannelVQ.initialize_`."""
        self.vq.initialize_(self._map(self.project_in, x), **options)

    def _codes(self, indices: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.vq.decode(indices, shape).to(self.project_out.weight.dtype)

    def _axis(self, rank: int) -> int:
        return CHANNEL_AXIS[self.arrangement.layout or ("BCHW" if rank == 4 else "BLC")]

    def _map(self, linear: nn.Linear, x: Tensor) -> Tensor:
        axis = self._axis(x.dim())
        return linear(x.movedim(axis, -1)).movedim(-1, axis)

    def _over_channels(self, tokens: Tensor, inner: tuple[int, ...]) -> Tensor:
        """bool ``[B, T]``, equal for the tokens of a position, in the latents' layout, with one channel to broadcast."""
        if len(inner) == 2 and self.arrangement.layout is None:
            return tokens[..., None]
        spread = tokens[..., None].expand(*tokens.shape, self.vq.code_dim)
        return self.arrangement.latents(spread, inner).narrow(self._axis(len(inner) + 1), 0, 1)
