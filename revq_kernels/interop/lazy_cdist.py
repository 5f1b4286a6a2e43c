"""`fast_distances`: within its block ``torch.cdist`` returns a lazy matrix, from which the nearest code needs no matrix."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from revq_kernels import nearest_code

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")

_METHODS = "size dim ndimension numel nelement element_size is_floating_point is_complex get_device __len__"
_PROPERTIES = "shape ndim dtype device layout requires_grad is_leaf is_cuda is_cpu is_meta itemsize nbytes"
_METADATA = {getattr(Tensor, name) for name in _METHODS.split()} | {torch.numel, torch.is_floating_point}
_METADATA |= {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()}

# Each function maps to the sign of the matrix for which it asks for the nearest code; the farthest code needs the matrix
_ARG = {torch.argmin: 1, Tensor.argmin: 1, torch.argmax: -1, Tensor.argmax: -1}
_BEST = {torch.min: 1, Tensor.min: 1, torch.max: -1, Tensor.max: -1}
_TOPK = {torch.topk, Tensor.topk}
_NEGATIVE = {torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__}
_SQUEEZE = {torch.squeeze, Tensor.squeeze}
_SELECT = {torch.select, Tensor.select}


class fast_distances(TorchFunctionMode):
    """Experimental: within ``with fast_distances():``, ``torch.cdist(x, c)`` (p = 2) returns a tensor that is computed later.

    `revq_kernels.nearest_code` answers its ``argmin(dim)``, ``min(dim)`` and ``topk(1, largest=False)`` over the codes (the
    last dim) or the queries (the dim before it), and ``argmax``, ``max`` and ``topk(1)`` of its negative, as methods or as
    functions of torch, without the ``[..., N, K]`` matrix.  Values carry a gradient to both operands.  Any other use computes
    the result of torch.cdist, with its gradient, and continues with that, also after the block.

    x is ``[*bx, N, d]`` and c ``[*bc, K, d]``, with batch dims that broadcast; float32, or bfloat16 and float16 of one
    dtype (the search reads them exactly, values have that dtype), or any of the three under autocast (float32, as
    torch.cdist).  torch.cdist itself runs for: p other than 2, float64, empty operands, tensor subclasses, and calls under
    torch.compile, torch.func, torch.jit.trace and torch.export.

    The index follows the exactness contract (docs/design.md): the nearest code by exact distance, the lowest index among
    equals, a NaN first.  torch.cdist computes larger matrices by |x|^2 + |c|^2 - 2 x c, whose cancellation can select a
    farther code, and torch.argmin guarantees no order among codes that it sees as equal: there the results differ.  Once
    another use has computed the matrix, argmin, min and topk are those of the matrix.

    The block belongs to one thread and can be nested.  Each torch call within it costs about a microsecond more.

    Raises:
        RuntimeError: on a use of the result, if an operand was changed in place since torch.cdist was called.  Changes
            that torch does not count (through ``.data`` or numpy, or in inference mode) are not detected.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cdist and not torch.compiler.is_compiling():
            operands = _operands(*args, **kwargs)
            if operands is not None:
                return LazyDistances.of(operands)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Operands:
    """``sign * torch.cdist(x, c)``, not computed.

    Attributes:
        x: ``[*bx, N, d]``, an alias of the caller's tensor, with its gradient.
        c: ``[*bc, K, d]``, likewise.
        batch: the shape b to which bx and bc broadcast; the matrix is ``[*b, N, K]``.
        dtype: dtype of the matrix; torch.float32 under autocast, else that of the operands.
        compute_mode: as for torch.cdist.
        grad: whether gradients were enabled when torch.cdist was called.
        versions: version counters of x and c at that time; None for inference tensors, which have none.
        sign: 1, or -1 for the negated matrix.
        fused: whether the search may answer questions about the matrix; False for classes that stand for another matrix.
    """

    fused: ClassVar[bool] = True

    x: Tensor
    c: Tensor
    batch: torch.Size
    dtype: torch.dtype
    compute_mode: str
    grad: bool
    versions: tuple[int | None, ...]
    sign: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix: ``[*b, N, K]``."""
        return (*self.batch, self.x.shape[-2], self.c.shape[-2])

    def matrix(self) -> Tensor:
        """The matrix ``[*b, N, K]`` that torch.cdist would have returned, with the same gradient.

        Raises:
            RuntimeError: if an operand was changed in place since torch.cdist was called.
        """
        self._check_unchanged()
        inference = self.x.is_inference() or self.c.is_inference()
        with torch._C.DisableTorchFunction(), torch.inference_mode(inference), torch.set_grad_enabled(self.grad):
            with _no_autocast(self.x.device.type):
                full = torch.cdist(self.x.to(self.dtype), self.c.to(self.dtype), 2.0, self.compute_mode)
            return full if self.sign > 0 else full.neg()

    def nearest(self, dim: int) -> Tensor:
        """The argmin of the distance over ``dim``, without the matrix: int64 ``[*b, N]`` for -1, ``[*b, K]`` for -2.

        Raises:
            RuntimeError: as `matrix`.
        """
        self._check_unchanged()
        x, c = (self.x, self.c) if dim == -1 else (self.c, self.x)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return _search(x.detach(), c.detach(), self.batch)

    def distance(self, indices: Tensor, dim: int) -> Tensor:
        """The matrix's entries at ``indices`` (of `nearest`), in the same shape, with a gradient to both operands."""
        x, c = (self.x, self.c) if dim == -1 else (self.c, self.x)
        with torch._C.DisableTorchFunction(), _no_autocast(x.device.type):
            if c.shape[:-2].numel() == 1:
                code = c.reshape(c.shape[-2:]).index_select(0, indices.flatten()).unflatten(0, indices.shape)
            else:
                places = indices.unsqueeze(-1).expand(*indices.shape, c.shape[-1])
                code = c.expand(*self.batch, *c.shape[-2:]).gather(-2, places)
            # As in torch.cdist, the norm has gradient 0 where the distance is 0
            value = torch.linalg.vector_norm(x.float() - code.float(), dim=-1).to(self.dtype)
            return value if self.sign > 0 else value.neg()

    def negated(self) -> "Operands":
        """The operands of the negated matrix."""
        return dataclasses.replace(self, sign=-self.sign)

    def selected(self, index: int) -> "Operands":
        """The operands of ``matrix[index]`` for a matrix with batch dims; ``index`` in [0, b[0])."""
        grad = self.grad and torch.is_grad_enabled()

        def part(operand: Tensor) -> Tensor:
            operand = operand if grad else operand.detach()
            if operand.dim() < len(self.batch) + 2:
                return operand
            return operand[index if operand.shape[0] > 1 else 0]

        with torch._C.DisableTorchFunction(), torch.set_grad_enabled(grad):
            return dataclasses.replace(self, x=part(self.x), c=part(self.c), batch=self.batch[1:], grad=grad)

    def replaced(self, x: Tensor, c: Tensor) -> "Operands":
        """The operands of the same matrix over other tensors, with a gradient."""
        return dataclasses.replace(self, x=x, c=c, grad=True, versions=_versions(x, c))

    def _check_unchanged(self) -> None:
        if _versions(self.x, self.c) != self.versions:
            raise RuntimeError(
                "torch.cdist inside revq.fast_distances(): an operand was changed in place between torch.cdist and the "
                "use of its result; use the result first, or call .clone() on it to compute it at once"
            )


class LazyDistances(Tensor):
    """``torch.cdist(x, c)`` ``[..., N, K]``, or its negative, as long as no use needs the whole matrix.

    Shape, dtype and device are known.  ``argmin``, ``min`` and ``topk(1, largest=False)`` over one of the last two dims
    (``argmax``, ``max``, ``topk(1)`` of the negative) run the fused search.  ``-d``, and ``d[i]`` or ``d.squeeze(0)`` over
    a leading batch dim, stay lazy.  Any other use computes the matrix, which then takes this tensor's place.

    Attributes:
        operands: an `Operands`, or an object with the same attributes ``x, c, grad, shape, dtype, fused`` and methods
            ``matrix`` and ``replaced``, if ``fused`` is False.
    """

    operands: Any
    _matrix: Tensor | None
    _parent: "tuple[LazyDistances, int] | None"

    @staticmethod
    def of(operands: Any, parent: "tuple[LazyDistances, int] | None" = None) -> "LazyDistances":
        """The tensor for ``operands``; ``parent`` is (tensor, i) if it is a view of row i of that tensor."""
        with torch._C.DisableTorchFunction():
            if operands.grad and (operands.x.requires_grad or operands.c.requires_grad):
                return _Link.apply(operands.x, operands.c, operands, parent)
            return _wrap(operands, parent)

    def materialize(self) -> Tensor:
        """The matrix, an ordinary tensor; computed once, so that changes in place are kept.

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
        """Whether the matrix is not computed yet."""
        return self._matrix is None and (self._parent is None or self._parent[0].is_lazy)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _untraced_answer()(cls, func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a static function as a placeholder
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Only calls that skip __torch_function__ arrive here (TorchScript, C++), below autograd, so the matrix is not kept
        if func._schema.is_mutable and args and isinstance(args[0], cls):
            raise RuntimeError(
                f"{func}: cannot change a lazy torch.cdist in place from here; call .clone() on it first"
            )
        args, kwargs = tree_map_only(cls, _data, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Link(torch.autograd.Function):
    """Connects the lazy tensor to its operands in the autograd graph, for code that bypasses ``__torch_function__``.

    A custom autograd.Function, for example, reads requires_grad of its inputs before any torch function sees them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, operands: Any, parent: Any) -> Tensor:
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


def _wrap(operands: Any, parent: tuple[LazyDistances, int] | None) -> LazyDistances:
    lazy = Tensor._make_wrapper_subclass(
        LazyDistances, operands.shape, dtype=operands.dtype, device=operands.x.device, requires_grad=False
    )
    lazy.operands, lazy._matrix, lazy._parent = operands, None, parent
    return lazy


def _data(lazy: LazyDistances) -> Tensor:
    return (lazy.operands.matrix() if lazy.is_lazy else lazy.materialize()).detach()


def _answer(cls: type[LazyDistances], func: Callable, args: tuple, kwargs: dict) -> Any:
    if not args and isinstance(kwargs.get("input"), cls):
        args = (kwargs.pop("input"),)
    if args and isinstance(args[0], cls) and args[0].is_lazy:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        answer = _fused_answer(func, *args, **kwargs)
        if answer is not None:
            return answer
    args, kwargs = tree_map_only(cls, cls.materialize, (args, kwargs))
    return func(*args, **kwargs)


_disabled_answer: Callable | None = None


def _untraced_answer() -> Callable:
    """`_answer`, kept from being traced by Dynamo.

    After a graph break in the caller, torch.compile would otherwise compile parts of `_answer`, and reuse the code of one
    torch function for another.  torch.compiler.disable loads Dynamo, which takes seconds, so it is applied only where
    Dynamo is loaded already.
    """
    global _disabled_answer
    if "torch._dynamo" not in sys.modules:
        return _answer
    if _disabled_answer is None:
        _disabled_answer = torch.compiler.disable(_answer)
    return _disabled_answer


def _fused_answer(func: Callable, lazy: LazyDistances, *args: Any, **kwargs: Any) -> Any:
    """The result of ``func(lazy, ...)``, or None if that needs the matrix (for the result, or for the usual error)."""
    if not lazy.operands.fused:
        return None
    for known, answer, arguments in _ANSWERS:
        if func in known:
            try:
                parsed = arguments(*args, **kwargs)
            except TypeError:  # an overload without a fused answer
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
    """``lazy[index]``, over a batch dim: a view, so it refers to its parent, whose changes it shows."""
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


# Functions, their answer, and a parser of their arguments after the first, with the parameter names of torch
_ANSWERS: tuple[tuple[Any, Callable, Callable], ...] = (
    (_ARG, _arg, lambda dim=None, keepdim=False: (dim, keepdim)),
    (_BEST, _best, lambda dim=None, keepdim=False: (dim, keepdim)),
    (_TOPK, _topk, lambda k, dim=-1, largest=True, sorted=True: (k, dim, largest, sorted)),
    (_NEGATIVE, _negative, lambda: ()),
    ({Tensor.__getitem__}, _row, lambda index: (0, index)),
    (_SQUEEZE, _row, lambda dim: (dim, 0)),
    (_SELECT, _row, lambda dim, index: (dim, index)),
)


def _operands(x1: Any, x2: Any, p: Any = 2.0, compute_mode: Any = _MODES[0]) -> Operands | None:
    """The operands of a call of torch.cdist; None if torch.cdist itself must run (or raise)."""
    if not (_is_plain(x1) and _is_plain(x2) and isinstance(p, int | float) and p == 2 and compute_mode in _MODES):
        return None
    if x1.dim() < 2 or x2.dim() < 2 or x1.shape[-1] != x2.shape[-1] or x1.device != x2.device:
        return None
    if not x1.numel() or not x2.numel() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
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
        # An alias keeps the present memory of x after ``x.data = ...``
        x, c = (t.view_as(t) if grad else t.detach() for t in (x1, x2))
    return Operands(x, c, batch, torch.float32 if autocast else x1.dtype, compute_mode, grad, _versions(x, c))


def _is_plain(operand: Any) -> bool:
    return (
        type(operand) in (Tensor, nn.Parameter)
        and operand.layout is torch.strided
        and not operand.is_nested
        and operand.dtype in _DTYPES
    )


def _versions(*operands: Tensor) -> tuple[int | None, ...]:
    """Version counters; None for inference tensors, which have none."""
    return tuple(None if operand.is_inference() else operand._version for operand in operands)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Disables autocast, which would convert operands that already have the dtype of the result."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext()


def _search(x: Tensor, c: Tensor, batch: torch.Size) -> Tensor:
    """Search x ``[*bx, N, d]`` in c ``[*bc, K, d]``, broadcast to the batch shape b: contiguous int64 ``[*b, N]``.

    Batch dims along which c differs become groups.  Along the others one codebook serves all, and where x does not differ
    either, the search runs once.
    """
    rank = len(batch)
    x, c = (_compact(t.reshape((1,) * (rank + 2 - t.dim()) + t.shape)) for t in (x, c))
    groups = [i for i in range(rank) if c.shape[i] > 1]
    shared = [i for i in range(rank) if c.shape[i] == 1]
    order = [*shared, rank, *groups]
    x = x.expand(*(batch[i] if i in groups else x.shape[i] for i in range(rank)), *x.shape[rank:])
    queries = x.permute(*order, rank + 1).reshape(*(x.shape[i] for i in order[: len(shared) + 1]), -1, x.shape[-1])
    found = nearest_code(queries, c.reshape(-1, *c.shape[-2:]))
    found = found.reshape([x.shape[i] for i in order]).permute([order.index(i) for i in range(rank + 1)])
    return found.expand(*batch, -1).contiguous()


def _compact(operand: Tensor) -> Tensor:
    """Batch dims that ``expand`` made (stride 0) reduced to 1."""
    for i in range(operand.dim() - 2):
        if operand.stride(i) == 0:
            operand = operand.narrow(i, 0, 1)
    return operand
