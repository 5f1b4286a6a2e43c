"""Which questions about a lazy distance matrix the fused search answers, and their answers in torch's own types."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from revq_kernels.interop.lazy_cdist import LazyDistances

# Under each function the sign of the matrix for which it asks for the nearest: the farthest takes the matrix
_ARG = {torch.argmin: 1, Tensor.argmin: 1, torch.argmax: -1, Tensor.argmax: -1}
_BEST = {torch.min: 1, Tensor.min: 1, torch.max: -1, Tensor.max: -1}
_TOPK = {torch.topk, Tensor.topk}
_NEGATIVE = {torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__}
_SQUEEZE = {torch.squeeze, Tensor.squeeze}
_SELECT = {torch.select, Tensor.select}


def fused_answer(func: Callable, lazy: LazyDistances, *args: Any, **kwargs: Any) -> Any:
    """What ``func(lazy, ...)`` returns, or None where that takes the matrix (to answer, or to raise the usual error)."""
    if not lazy.operands.fused:
        return None
    for known, answer, arguments in _ANSWERS:
        if func in known:
            try:
                parsed = arguments(*args, **kwargs)
            except TypeError:  # an overload that is not answered here
                return None
            return answer(func, lazy, *parsed)
    return None


def _arg(func: Callable, lazy: LazyDistances, dim: Any, keepdim: bool) -> Tensor | None:
    dim = _search_dim(lazy, dim)
    if dim is None or lazy.operands.sign != _ARG[func]:
        return None
    indices = lazy.operands.nearest(dim)
    return indices.unsqueeze(dim) if keepdim else indices


def _best(func: Callable, lazy: LazyDistances, dim: Any, keepdim: bool) -> Any:
    dim = _search_dim(lazy, dim)
    if dim is None or lazy.operands.sign != _BEST[func]:
        return None
    kind = torch.return_types.min if lazy.operands.sign > 0 else torch.return_types.max
    return kind(_values_and_indices(lazy, dim, keepdim))


def _topk(func: Callable, lazy: LazyDistances, k: Any, dim: Any, largest: bool, _: bool) -> Any:
    dim = _search_dim(lazy, dim)
    if dim is None or k != 1 or lazy.operands.sign != (-1 if largest else 1):
        return None
    return torch.return_types.topk(_values_and_indices(lazy, dim, True))


def _negative(func: Callable, lazy: LazyDistances) -> LazyDistances:
    return type(lazy).of(lazy.operands.negated())


def _row(func: Callable, lazy: LazyDistances, dim: Any, index: Any) -> LazyDistances | None:
    """``lazy[index]``, over a batch dim: a view, so it keeps its parent and changes with it."""
    batch = lazy.operands.batch
    if not batch or type(index) is not int or type(dim) is not int or dim not in (0, -len(batch) - 2):
        return None
    if func in _SQUEEZE and batch[0] != 1:
        return None
    if not -batch[0] <= index < batch[0]:
        return None
    index %= batch[0]
    return type(lazy).of(lazy.operands.selected(index), (lazy, index))


def _search_dim(lazy: LazyDistances, dim: Any) -> int | None:
    """-1 over the codes, -2 over the queries, None for any other dim."""
    rank = len(lazy.operands.batch) + 2
    return {rank - 1: -1, -1: -1, rank - 2: -2, -2: -2}.get(dim) if type(dim) is int else None


def _values_and_indices(lazy: LazyDistances, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    indices = lazy.operands.nearest(dim)
    values = lazy.operands.distance(indices, dim)
    return (values.unsqueeze(dim), indices.unsqueeze(dim)) if keepdim else (values, indices)


# Functions, their answer, and their arguments after the first as torch's signatures have them
_ANSWERS: tuple[tuple[Any, Callable, Callable], ...] = (
    (_ARG, _arg, lambda dim=None, keepdim=False: (dim, keepdim)),
    (_BEST, _best, lambda dim=None, keepdim=False: (dim, keepdim)),
    (_TOPK, _topk, lambda k, dim=-1, largest=True, sorted=True: (k, dim, largest, sorted)),
    (_NEGATIVE, _negative, lambda: ()),
    ({Tensor.__getitem__}, _row, lambda index: (0, index)),
    (_SQUEEZE, _row, lambda dim: (dim, 0)),
    (_SELECT, _row, lambda dim, index: (dim, index)),
)
