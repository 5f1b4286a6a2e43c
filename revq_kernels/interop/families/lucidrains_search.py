"""The search of vector-quantize-pytorch's codebooks, with its rule for ties, and the lazy matrix of distances they return."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from revq_kernels import nearest_code
from revq_kernels.interop.lazy_cdist import LazyDistances

_TIE = 1e-8
"""The package clamps squared distances to this minimum, so smaller ones are equal."""

_ELEMENTS = 1 << 20
"""Limit on the elements held at a time in the comparison of codes that tie."""


def assign(x: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """The index that the package's argmax gives for each row of ``x`` ``[h, n, d]`` in ``codes`` ``[h, K, d]``: ``[h, n]``.

    With ``cosine``, the code of the largest inner product, for codes of any norm; else the code of the smallest distance,
    where all codes within 1e-4 of a row tie.  The lowest index among equals.
    """
    x, codes = x.detach(), codes.detach()
    if cosine:
        return _search(F.pad(x, (0, 1)), _with_equal_norms(codes))
    indices = _search(x, codes)
    close = (x - rows_of(codes, indices)).square().sum(dim=-1) <= _TIE
    if close.any():
        for head, found in enumerate(indices):
            found[close[head]] = _lowest_tied(x[head, close[head]], codes[head])
    return indices


def rows_of(codes: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``codes`` ``[h, K, d]`` at ``indices`` ``[h, n]``, with their gradient: ``[h, n, d]``."""
    heads, num_codes, dim = codes.shape
    offset = torch.arange(heads, device=codes.device).unsqueeze(1) * num_codes
    return F.embedding(indices + offset, codes.reshape(-1, dim))


def _search(x: Tensor, codes: Tensor) -> Tensor:
    return nearest_code(x.transpose(0, 1), codes).transpose(0, 1).contiguous()


def _with_equal_norms(codes: Tensor) -> Tensor:
    """The codes with one more element that makes all norms equal: then the nearest to (x, 0) has the largest inner product."""
    squares = codes.double().square().sum(dim=-1, keepdim=True)
    largest = squares.nan_to_num(0.0).amax(dim=1, keepdim=True)
    return torch.cat((codes, (largest - squares).clamp(min=0).sqrt().to(codes.dtype)), dim=-1)


def _lowest_tied(x: Tensor, codes: Tensor) -> Tensor:
    """The lowest index of the codes ``[K, d]`` that tie for each row of ``x`` ``[m, d]``, of which at least one does.

    Only codes whose first element is within the tie's distance can tie; sorting by the first element finds them.
    """
    keys, order = codes[:, 0].double().sort()
    radius = 1.001 * _TIE**0.5
    start = torch.searchsorted(keys, x[:, 0].double() - radius)
    count = torch.searchsorted(keys, x[:, 0].double() + radius, right=True) - start
    lowest = order.new_full((len(x),), len(codes))
    for part in torch.arange(len(x), device=x.device).split(max(1, _ELEMENTS // (int(count.max()) * x.shape[1]))):
        row = part.repeat_interleave(count[part])
        skipped = count[part].cumsum(0) - count[part]  # the pairs of earlier rows
        code = order[torch.arange(len(row), device=x.device) + (start[part] - skipped).repeat_interleave(count[part])]
        ties = (x[row] - codes[code]).square().sum(dim=-1) <= _TIE
        lowest.scatter_reduce_(0, row[ties], code[ties], "amin")
    return lowest


@dataclass(frozen=True)
class _Similarities:
    """Inner products of ``x`` ``[h, n, d]`` and ``c`` ``[h, K, d]``, or their negative distances; not computed.

    Attributes:
        x: with its gradient.
        c: with its gradient.
        updated: the tensor that holds the codes after an update, if c is a copy from before it; else c itself.
        positions: the shape that n stands for.
        cdist: the package's function; None for inner products.
        autocast: the dtype of autocast when the package would have computed the matrix, None without autocast.
        grad: whether gradients were enabled then.
    """

    x: Tensor
    c: Tensor
    updated: Tensor
    positions: torch.Size
    cdist: Callable[[Tensor, Tensor], Tensor] | None
    autocast: torch.dtype | None
    grad: bool
    fused: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return (self.x.shape[0], *self.positions, self.c.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix."""
        return self.autocast if self.cdist is None and self.autocast is not None else self.x.dtype

    def matrix(self) -> Tensor:
        """The matrix, computed as the package does."""
        kind, narrow = self.x.device.type, self.autocast is not None
        with torch.set_grad_enabled(self.grad), torch.autocast(kind, dtype=self.autocast, enabled=narrow):
            full = torch.einsum("hnd,hkd->hnk", self.x, self.c) if self.cdist is None else -self.cdist(self.x, self.c)
        if self.updated is not self.c:  # in the package, the gradient of x reads the codebook after its update
            self.c.data.copy_(self.updated.data)
        return full.view(self.shape)

    def replaced(self, x: Tensor, c: Tensor) -> "_Similarities":
        """The same matrix over other tensors, with a gradient."""
        return replace(self, x=x, c=c, updated=c, grad=True)


def similarities(
    x: Tensor, c: Tensor, positions: torch.Size, cdist: Callable[[Tensor, Tensor], Tensor] | None, updated: bool
) -> LazyDistances:
    """The matrix that the package returns, computed on its first use; few options of the package use it.

    Args:
        x: ``[h, n, d]``.
        c: ``[h, K, d]``.
        positions: the shape that n stands for.
        cdist: the package's distance ``[h, n, K]``, of which the matrix is the negative; None for inner products.
        updated: whether an update changes the memory of ``c`` before the matrix may be used.
    """
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    before = c.clone() if updated else c
    return LazyDistances.of(_Similarities(x, before, c, positions, cdist, autocast, torch.is_grad_enabled()))
