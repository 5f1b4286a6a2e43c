"""A tensor that stands for a distance matrix, answers what the fused search can, and becomes the matrix for the rest."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from revq_kernels.interop.distance_operands import Operands
from revq_kernels.interop.fused_answers import fused_answer

_METHODS = "size dim ndimension numel nelement element_size is_floating_point is_complex get_device __len__"
_PROPERTIES = "shape ndim dtype device layout requires_grad is_leaf is_cuda is_cpu is_meta itemsize nbytes"
_METADATA = {getattr(Tensor, name) for name in _METHODS.split()} | {torch.numel, torch.is_floating_point}
_METADATA |= {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()}


class LazyDistances(Tensor):
    """``torch.cdist(x, c)`` ``[..., N, K]``, or its negative, before anything needed the whole of it.

    Shape, dtype and device are known.  ``argmin``, ``min`` and ``topk(1, largest=False)`` over one of the last two dims
    (``argmax``, ``max``, ``topk(1)`` of the negative) run the fused search.  ``-d``, and ``d[i]`` or ``d.squeeze(0)`` over
    a leading batch dim, stay lazy.  Anything else computes the matrix, which from then on stands in this tensor's place.
    """

    operands: Operands
    _matrix: Tensor | None
    _parent: "tuple[LazyDistances, int] | None"

    @staticmethod
    def of(operands: Operands, parent: "tuple[LazyDistances, int] | None" = None) -> "LazyDistances":
        """The tensor for ``operands``; ``parent`` is (tensor, i) where it is that tensor's row i, as a view."""
        with torch._C.DisableTorchFunction():
            if operands.grad and (operands.x.requires_grad or operands.c.requires_grad):
                return _Link.apply(operands.x, operands.c, operands, parent)
            return _wrap(operands, parent)

    def materialize(self) -> Tensor:
        """The matrix itself, an ordinary tensor; computed once, so that changes in place are kept.

        Raises:
            RuntimeError: if an operand was changed in place since torch.cdist was called.
        """
        if self._matrix is None and self._parent is not None:
            parent, index = self._parent
            with torch.set_grad_enabled(self.operands.grad):
                self._matrix = parent.materialize()[index]
        elif self._matrix is None:
            self._matrix = self.operands.matrix()
        return self._matrix

    @property
    def is_lazy(self) -> bool:
        """Whether the matrix is still not computed."""
        return self._matrix is None and (self._parent is None or self._parent[0].is_lazy)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _eager()(cls, func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Only calls that skip __torch_function__ come here (TorchScript, C++); below autograd, so nothing may be kept
        if func._schema.is_mutable and args and isinstance(args[0], cls):
            raise RuntimeError(
                f"{func}: cannot change a lazy torch.cdist in place from here; call .clone() on it first"
            )
        args, kwargs = tree_map_only(cls, _data, (args, kwargs or {}))
        return func(*args, **kwargs)


def _answer(cls: type[LazyDistances], func: Callable, args: tuple, kwargs: dict) -> Any:
    if not args and isinstance(kwargs.get("input"), cls):
        args = (kwargs.pop("input"),)
    if args and isinstance(args[0], cls) and args[0].is_lazy:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        answer = fused_answer(func, *args, **kwargs)
        if answer is not None:
            return answer
    args, kwargs = tree_map_only(cls, cls.materialize, (args, kwargs))
    return func(*args, **kwargs)


class _Link(torch.autograd.Function):
    """Ties the lazy tensor to its operands, for uses that autograd sees before `LazyDistances` can step in.

    A custom autograd.Function, for one, reads its inputs' requires_grad without asking.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, operands: Operands, parent: Any) -> Tensor:
        ctx.save_for_backward(x, c)
        ctx.operands = operands
        return _wrap(operands, parent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needed = ctx.needs_input_grad[:2]
        x, c = (t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True))
        matrix = ctx.operands.replaced(x, c).matrix()
        found = iter(torch.autograd.grad(matrix, [t for t in (x, c) if t.requires_grad], grad))
        return (*(next(found) if need else None for need in needed), None, None)


_undisturbed: list[Callable] = []


def _eager() -> Callable:
    """`_answer`, which a torch.compile that gave up on its caller shall not compile piece by piece instead.

    Such pieces were seen to answer for one torch function with the code of another.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can be compiling, and loading it takes seconds
        return _answer
    if not _undisturbed:
        _undisturbed.append(torch.compiler.disable(_answer))
    return _undisturbed[0]


def _wrap(operands: Operands, parent: "tuple[LazyDistances, int] | None") -> LazyDistances:
    lazy = Tensor._make_wrapper_subclass(
        LazyDistances, operands.shape, dtype=operands.dtype, device=operands.x.device, requires_grad=False
    )
    lazy.operands, lazy._matrix, lazy._parent = operands, None, parent
    return lazy


def _data(lazy: LazyDistances) -> Tensor:
    return (lazy.operands.matrix() if lazy.is_lazy else lazy.materialize()).detach()
