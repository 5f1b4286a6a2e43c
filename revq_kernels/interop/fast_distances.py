"""`fast_distances`: torch.cdist without its matrix, in code that cannot be edited."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from revq_kernels.interop.distance_operands import Operands, versions
from revq_kernels.interop.lazy_cdist import LazyDistances

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")


class fast_distances(TorchFunctionMode):
    """Within ``with fast_distances():``, ``torch.cdist(x, c)`` (p = 2) returns a tensor that is not computed yet.

    Its ``argmin(dim)``, ``min(dim)`` and ``topk(1, largest=False)`` over the codes (the last dim) or the queries (the one
    before it), and ``argmax``, ``max`` and ``topk(1)`` of its negative, as methods or functions of torch, are answered by
    `revq_kernels.nearest_code` without the ``[..., N, K]`` matrix.  Values carry a gradient to both operands.  Anything
    else that is done with it computes the ordinary result of torch.cdist, with its gradient, and continues with that;
    also after the block.

    x is ``[*bx, N, d]`` and c ``[*bc, K, d]``, with batch dims that broadcast; float32, or bfloat16 and float16 of one
    dtype (the search reads them exactly, values come back in that dtype), or any of the three under autocast (as
    torch.cdist, in float32).  Left to torch.cdist: p other than 2, float64, empty operands, tensor subclasses, and calls
    under torch.compile, torch.func, torch.jit.trace and torch.export.

    The index is the exactness contract's: the nearest in float32 arithmetic of (x - c)^2, the lowest index among equals,
    a NaN first.  torch.cdist computes larger matrices by |x|^2 + |c|^2 - 2 x c, whose cancellation can make it return a
    farther code, and among codes it sees as equal torch.argmin promises no order: there the results differ.  Once the
    matrix has been computed for something else, argmin and its kin are those of the matrix.

    The block belongs to one thread, may be nested and ends with an exception.  Each torch call in it costs about a
    microsecond more.

    Raises:
        RuntimeError: from a use of the result, if an operand was changed in place since torch.cdist was called.  Changes
            that torch does not count (through ``.data`` or numpy, or under inference mode) are not noticed.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cdist and not torch.compiler.is_compiling():
            operands = _operands(*args, **kwargs)
            if operands is not None:
                return LazyDistances.of(operands)
        return func(*args, **kwargs)


def _operands(x1: Any, x2: Any, p: Any = 2.0, compute_mode: Any = _MODES[0]) -> Operands | None:
    """The call's operands, or None where torch.cdist itself is to answer (or to raise)."""
    if not (_is_plain(x1) and _is_plain(x2) and isinstance(p, int | float) and p == 2 and compute_mode in _MODES):
        return None
    if x1.dim() < 2 or x2.dim() < 2 or x1.shape[-1] != x2.shape[-1] or x1.device != x2.device:
        return None
    if not x1.numel() or not x2.numel() or _is_traced():
        return None
    try:
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    except RuntimeError:
        return None
    kind = x1.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if x1.dtype != x2.dtype and not autocast:
        return None
    grad = torch.is_grad_enabled()
    with torch._C.DisableTorchFunction():
        # An alias keeps the memory of today's x under ``x.data = ...``
        x, c = (t.view_as(t) if grad else t.detach() for t in (x1, x2))
    return Operands(x, c, batch, torch.float32 if autocast else x1.dtype, compute_mode, grad, versions(x, c))


def _is_plain(operand: Any) -> bool:
    return (
        type(operand) in (Tensor, nn.Parameter)
        and operand.layout is torch.strided
        and not operand.is_nested
        and operand.dtype in _DTYPES
    )


def _is_traced() -> bool:
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
