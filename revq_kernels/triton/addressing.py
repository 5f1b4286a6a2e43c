"""Address the rows of a tensor ``[..., G, d]`` of any strides, so that no contiguous copy of the queries is made."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class GroupedRows:
    """A tensor ``[..., G, d]`` seen as ``[outer, inner, G, d]``: row n is (n // inner, n mod inner)."""

    tensor: Tensor

    @property
    def count(self) -> int:
        """N, rows of one group."""
        return self.tensor.shape[0] * self.tensor.shape[1]

    def arguments(self) -> tuple[Any, ...]:
        """Kernel arguments: the tensor, the inner size and the four strides, in elements."""
        return self.tensor, self.tensor.shape[1], *self.tensor.stride()

    def chunks(self, rows: int) -> Iterator[tuple[int, "GroupedRows"]]:
        """Chunks of at most ``rows`` rows in order, each with the number of its first row."""
        outer, inner = self.tensor.shape[:2]
        if inner <= rows:
            for first in range(0, outer, rows // inner):
                yield first * inner, GroupedRows(self.tensor[first : first + rows // inner])
        else:
            for o in range(outer):
                for first in range(0, inner, rows):
                    yield o * inner + first, GroupedRows(self.tensor[o : o + 1, first : first + rows])


def grouped_rows(x: Tensor) -> GroupedRows:
    """View x ``[..., G, d]``, not empty, as rows; copies x if its leading dimensions do not fold into two."""
    folded: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(x.shape[:-2], x.stride()[:-2], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    if len(folded) > 2:
        return grouped_rows(x.contiguous())
    (outer, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *folded][-2:]
    sizes, strides = (outer, inner, *x.shape[-2:]), (outer_stride, inner_stride, *x.stride()[-2:])
    return GroupedRows(x.as_strided(sizes, strides))


@triton.jit
def query_rows(x, n, group, inner, x_stride_outer, x_stride_inner, x_stride_g):
    """Pointers to the rows of queries ``n`` of ``group`` (int64); n is cast to int32, since 64-bit division is slow."""
    n = n.to(tl.int32)
    outer = n // inner
    row = x + outer.to(tl.int64) * x_stride_outer + (n - outer * inner).to(tl.int64) * x_stride_inner
    return row + group * x_stride_g
