"""Codes that follow the mean of what chose them, instead of a gradient."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from revq_kernels import ops


class EMAUpdate(nn.Module):
    """Exponential moving averages as codes (van den Oord et al. 2017, appendix A.1).

    Each training call of the `FastChannelVQ` that it is given to (``update=EMAUpdate()``) moves, after the search,

        cluster_size <- decay cluster_size + (1 - decay) how often each code was chosen
        embed_sum    <- decay embed_sum    + (1 - decay) sum of the vectors that chose it
        code         <- embed_sum / cluster_size, with cluster_size smoothed (Laplace): (c + eps) / (n + K eps) n

    with n the sum of cluster_size over the codebook.  The codebook then takes no gradient, and the loss is the
    commitment term alone.  The sums are exact counts and the ordered segment sum of `quantize`'s gradient: no one-hot
    matrix, and equal bits in every run on the CPU.  Several processes: nothing is added up over them.

    Args:
        decay: share of the averages that a call keeps, in [0, 1).
        eps: the smoothing, in choices; > 0.

    Attributes (float32 also where the model is cast to another dtype):
        cluster_size: buffer float32 ``[G, K]``, 1 at the beginning.
        embed_sum: buffer float32 ``[G, K, d]``, the codes at the beginning.

    Raises:
        ValueError: for options out of range, or an object given to two quantizers.
    """

    def __init__(self, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a share in [0, 1), got {decay}")
        if not eps > 0:
            raise ValueError(f"eps: expected a number > 0, got {eps}")
        self.decay, self.eps = decay, eps

    def bind(self, codebook: nn.Parameter) -> None:
        """Make the averages of a codebook ``[G, K, d]``, which stops taking gradients."""
        if hasattr(self, "embed_sum"):
            raise ValueError("update: expected an EMAUpdate of its own, got one that another quantizer uses")
        codebook.requires_grad_(False)
        self.register_buffer("cluster_size", torch.ones_like(codebook[..., 0]))
        self.register_buffer("embed_sum", codebook.detach().clone())

    @torch.no_grad()
    def step_(self, codebook: Tensor, queries: Tensor, indices: Tensor, count: Tensor) -> None:
        """One update of codebook ``[G, K, d]``.

        Args:
            queries: ``[N, G, d]``; those that do not count are zeros.
            indices: int64 ``[N, G]``.
            count: int64 ``[G, K]``, how often each code was chosen by those that count.
        """
        total = ops.overload("segment_sum", "default")(queries, indices, codebook.shape[1])
        self.cluster_size.mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.embed_sum.mul_(self.decay).add_(total, alpha=1 - self.decay)
        size = self.cluster_size.sum(dim=1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (size + self.cluster_size.shape[1] * self.eps) * size
        mean = self.embed_sum / smoothed[..., None]
        codebook.copy_(torch.where(smoothed[..., None] > 0, mean, codebook))  # nothing was ever chosen: no mean

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EMAUpdate":
        """Averages stay float32 where the model is cast: in bfloat16, steps of 1 % round away."""
        averages = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, average in averages.items():
            setattr(self, name, average.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    def restart_(self, codebook: Tensor, moved: Tensor) -> None:
        """Begin anew at the codes of moved bool ``[G, K]``: else the next step would put them back where they were."""
        self.cluster_size.masked_fill_(moved, 1.0)
        self.embed_sum.copy_(torch.where(moved[..., None], codebook, self.embed_sum))
