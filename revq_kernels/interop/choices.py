"""Near ties: the searches of a run are recorded, and a float64 run takes the same codes where rounding cannot tell them apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ROUNDINGS = 64
"""Codes tie if their distances differ by this many float32 roundings of the largest distance of the row, or fewer."""

_ATEN = torch.ops.aten
_LARGEST = (_ATEN.argmax, _ATEN.max)


class Choices(TorchDispatchMode):
    """Records the indices that each search in the block takes, in order: argmin, argmax, min, max and this package's kernels.

    Which of two codes a search takes whose distances to a vector differ by rounding only depends on the order of additions, so
    on the machine and its load.  Neither code is wrong, and all that follows from it (codes, losses, counts) is right, too.

    Args:
        followed: the choices of another run.  A search of a matrix takes those of the search in the same place, where they tie
            with its own.

    Attributes:
        taken: the indices of each search.
    """

    def __init__(self, followed: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._followed = followed
        self.taken: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is torch.ops.revq.nearest_code:
            self.taken.append(result.movedim(-1, 0) if result.dim() > 1 else result)  # by codebook, then by vector
        elif (
            packet in (_ATEN.argmin, _ATEN.argmax, _ATEN.min, _ATEN.max)
            and (dim := _dimension(args, kwargs)) is not None
        ):
            indices = result[1] if isinstance(result, tuple) else result
            self._follow(args[0], dim, indices, packet in _LARGEST)
            self.taken.append(indices)
        return result

    def _follow(self, matrix: Tensor, dim: int, indices: Tensor, largest: bool) -> None:
        place = len(self.taken)
        if place >= len(self._followed) or self._followed[place].numel() != indices.numel() or not matrix.numel():
            return
        wanted = self._followed[place].to(indices.device).reshape(indices.shape)
        keep = indices.shape if indices.dim() == matrix.dim() else indices.unsqueeze(dim).shape
        if int(wanted.min()) < 0 or int(wanted.max()) >= matrix.shape[dim]:
            return
        best, found = (matrix.gather(dim, each.reshape(keep)) for each in (indices, wanted))
        scale = matrix.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim, keepdim=True)
        further = best - found if largest else found - best
        ties = further <= _ROUNDINGS * torch.finfo(torch.float32).eps * scale
        indices.copy_(torch.where(ties.reshape(indices.shape), wanted, indices))


def _dimension(args: tuple, kwargs: dict | None) -> int | None:
    """The dimension of a matrix that an operator searches; None if it is no search along one dimension."""
    dim: Any = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
    floating = isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].dim() > 1
    return dim if floating and isinstance(dim, int) else None
