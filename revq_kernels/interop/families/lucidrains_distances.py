"""What stands for the matrix that vector-quantize-pytorch's codebook returns, and that few of its options look at."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from revq_kernels.interop.lazy_cdist import LazyDistances


@dataclass(frozen=True)
class Similarities:
    """Inner products of ``x`` ``[h, n, d]`` and ``c`` ``[h, K, d]``, or the negative of their distances; not computed.

    Attributes:
        x: with its gradient.
        c: with its gradient.
        changed: the memory of c if c is a copy of what it was before an update, else c itself.
        places: the shape that n stands for.
        cosine: whether these are inner products.
        autocast: the dtype of autocast when the package would have computed the matrix, None without.
        grad: whether gradients were recorded then.
    """

    x: Tensor
    c: Tensor
    changed: Tensor
    places: torch.Size
    cosine: bool
    autocast: torch.dtype | None
    grad: bool
    fused: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return (self.x.shape[0], *self.places, self.c.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.autocast if self.cosine and self.autocast is not None else self.x.dtype

    def matrix(self) -> Tensor:
        """The matrix, as the package computes it."""
        from vector_quantize_pytorch.vector_quantize_pytorch import cdist

        kind, narrow = self.x.device.type, self.autocast is not None
        with torch.set_grad_enabled(self.grad), torch.autocast(kind, dtype=self.autocast, enabled=narrow):
            full = torch.einsum("hnd,hcd->hnc", self.x, self.c) if self.cosine else -cdist(self.x, self.c)
        if self.changed is not self.c:  # as in the package, whose gradient to x reads the codebook as updated
            self.c.data.copy_(self.changed.data)
        return full.view(self.shape)

    def replaced(self, x: Tensor, c: Tensor) -> "Similarities":
        """Of the same matrix over other tensors, with a gradient."""
        return replace(self, x=x, c=c, changed=c, grad=True)


def similarities(x: Tensor, c: Tensor, places: torch.Size, cosine: bool, updated: bool) -> LazyDistances:
    """A tensor that becomes the matrix with its first use, also if the memory of c is ``updated`` before that."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    before = c.clone() if updated else c
    return LazyDistances.of(Similarities(x, before, c, places, cosine, autocast, torch.is_grad_enabled()))
