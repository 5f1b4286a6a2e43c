"""What stands for a distance matrix until it is needed: its two operands, and what can be said of it without it."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from revq_kernels import nearest_code


@dataclass(frozen=True)
class Operands:
    """``sign * torch.cdist(x, c)``, not computed.

    Attributes:
        x: ``[*bx, N, d]``, an alias of the caller's, with its gradient.
        c: ``[*bc, K, d]``, as x.
        batch: the shape b to which bx and bc broadcast; the matrix is ``[*b, N, K]``.
        dtype: the matrix's; torch.float32 under autocast, the operands' own otherwise.
        compute_mode: as torch.cdist's.
        grad: whether gradients were recorded when torch.cdist was called.
        versions: version counters of x and c at that time; None for inference tensors, which have none.
        sign: 1, or -1 for the negated matrix.
        fused: whether the search answers questions about the matrix; for operands of another matrix it does not.
    """

    fused: ClassVar[bool] = True

    x: Tensor
    c: Tensor
    batch: torch.Size
    dtype: torch.dtype
    compute_mode: str
    grad: bool
    versions: tuple[int | None, int | None]
    sign: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: ``[*b, N, K]``."""
        return (*self.batch, self.x.shape[-2], self.c.shape[-2])

    def matrix(self) -> Tensor:
        """The whole matrix ``[*b, N, K]``, as torch.cdist would have returned it, with the same gradient.

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
        """The argmin of the distance over ``dim``: -1 gives int64 ``[*b, N]``, -2 ``[*b, K]``.  Never builds the matrix.

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
            # As torch.cdist, the norm has gradient 0 where the distance is 0
            value = torch.linalg.vector_norm(x.float() - code.float(), dim=-1).to(self.dtype)
            return value if self.sign > 0 else value.neg()

    def negated(self) -> "Operands":
        """Of the negated matrix."""
        return dataclasses.replace(self, sign=-self.sign)

    def selected(self, index: int) -> "Operands":
        """Of ``matrix[index]``, where the matrix has a batch; ``index`` in [0, b[0])."""

        grad = self.grad and torch.is_grad_enabled()

        def part(operand: Tensor) -> Tensor:
            operand = operand if grad else operand.detach()
            if operand.dim() < len(self.batch) + 2:
                return operand
            return operand[index if operand.shape[0] > 1 else 0]

        with torch._C.DisableTorchFunction(), torch.set_grad_enabled(grad):
            return dataclasses.replace(self, x=part(self.x), c=part(self.c), batch=self.batch[1:], grad=grad)

    def replaced(self, x: Tensor, c: Tensor) -> "Operands":
        """Of the same matrix over other tensors, with a gradient."""
        return dataclasses.replace(self, x=x, c=c, grad=True, versions=versions(x, c))

    def _check_unchanged(self) -> None:
        if versions(self.x, self.c) != self.versions:
            raise RuntimeError(
                "torch.cdist inside revq.fast_distances(): an operand was changed in place between torch.cdist and the "
                "use of its result; use the result first, or call .clone() on it to compute it at once"
            )


def versions(*operands: Tensor) -> tuple[int | None, ...]:
    """Version counters; None for inference tensors, which have none."""
    return tuple(None if operand.is_inference() else operand._version for operand in operands)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The operands are converted already, and autocast would convert its own way."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext()


def _search(x: Tensor, c: Tensor, batch: torch.Size) -> Tensor:
    """x ``[*bx, N, d]`` against c ``[*bc, K, d]``, broadcast to b: contiguous int64 ``[*b, N]``.

    Batch dims along which c differs become groups; along the others one codebook serves all, and where x does not differ
    either, the search is done once.
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
    """Batch dims that an expand made (stride 0) cut back to 1."""
    for i in range(operand.dim() - 2):
        if operand.stride(i) == 0:
            operand = operand.narrow(i, 0, 1)
    return operand
