"""`ProjectedVQ`: codes of fewer elements than the latent has channels."""

from typing import Any

import torch
from torch import Tensor, nn

from revq_kernels.nn.channel_vq import FastChannelVQ
from revq_kernels.nn.layout import CHANNEL_AXIS, TokenLayout
from revq_kernels.nn.output import QuantizerDetails


class ProjectedVQ(nn.Module):
    """A linear map in, a `FastChannelVQ` of low dimension, a linear map out (Yu et al. 2022, "factorized codes"; DAC).

    The loss compares the projected latents with their codes; the maps get the gradient of the decoder through the
    quantizer's estimator.  The result has the output format of ``vq``, and its quantized latents are mapped out.

    Args:
        dim: channels of the latents, at the axis of ``vq``'s layout (its last for tokens).
        vq: the quantizer.
        inner: channels of its input; its code_dim if None.

    Attributes:
        project_in, project_out: ``nn.Linear``, dim to inner and back.
    """

    def __init__(self, dim: int, vq: FastChannelVQ, *, inner: int | None = None) -> None:
        super().__init__()
        inner = vq.code_dim if inner is None else inner
        # float64, as the default dtype, would make queries that a search refuses
        dtype = torch.float32 if torch.get_default_dtype() == torch.float64 else None
        with torch.inference_mode(False):  # tensors made in that mode could not be trained outside it
            project_in, project_out = nn.Linear(dim, inner, dtype=dtype), nn.Linear(inner, dim, dtype=dtype)
        self.project_in, self.vq, self.project_out = project_in, vq, project_out

    @property
    def token_layout(self) -> TokenLayout:
        """That of ``vq``."""
        return self.vq.token_layout

    def forward(self, x: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None) -> Any:
        """As `FastChannelVQ.forward`, for latents of ``dim`` channels; a masked position keeps its own value."""
        return self.vq.output_format(self.quantize(x, mask=mask, lengths=lengths), self.vq)

    def quantize(self, x: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None) -> QuantizerDetails:
        """As `forward`, before the output format; ``details.x`` is the projected input."""
        shape = list(x.shape)
        shape[self._axis(x.dim())] = self.project_in.out_features
        tokens = self.token_layout.mask(x.new_empty(shape, device="meta"), mask, lengths)
        if tokens is None:
            details = self.vq.quantize(self._map(self.project_in, x))
            return details._replace(quantized=self._map(self.project_out, details.quantized))
        counts = self._over_channels(tokens, tuple(shape[1:]))
        # Zeros: the gradient of a linear map would carry padding of NaN into its weights.
        details = self.vq.quantize(self._map(self.project_in, torch.where(counts, x, 0)), mask=mask, lengths=lengths)
        quantized = self._map(self.project_out, details.quantized)
        return details._replace(quantized=torch.where(counts, quantized, x))

    def encode(self, x: Tensor) -> Tensor:
        """The indices int64 ``[B, T]`` of ``x``; counts nothing."""
        return self.vq.encode(self._map(self.project_in, x))

    def decode(self, indices: Tensor, latent_shape: tuple[int, ...] | None = None) -> Tensor:
        """The latents that ``indices`` int64 ``[B, T]`` stand for, zeros for -1: ``[B, *latent_shape]``.

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
        return CHANNEL_AXIS[self.token_layout.layout or ("BCHW" if rank == 4 else "BLC")]

    def _map(self, linear: nn.Linear, x: Tensor) -> Tensor:
        axis = self._axis(x.dim())
        return linear(x.movedim(axis, -1)).movedim(-1, axis)

    def _over_channels(self, tokens: Tensor, inner: tuple[int, ...]) -> Tensor:
        """bool ``[B, T]``, equal for the tokens of a position, in the latents' layout, with one channel to broadcast."""
        if len(inner) == 2 and self.token_layout.layout is None:
            return tokens[..., None]
        spread = tokens[..., None].expand(*tokens.shape, self.vq.code_dim)
        return self.token_layout.latents(spread, inner).narrow(self._axis(len(inner) + 1), 0, 1)
