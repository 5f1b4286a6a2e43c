"""Near ties: the searches of a run are recorded, and a float64 run takes the same codes where rounding cannot tell them apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ROUNDINGS, _FACTOR = 64, 2.0
"""Codes tie if their distances differ by this many float32 roundings of the largest distance of the row, or fewer; or by
this multiple of the most by which a code that the original took is farther than the nearest, as in half precision."""

_ATEN = torch.ops.aten
_LARGEST = (_ATEN.argmax, _ATEN.max)


class Choices(TorchDispatchMode):
    """Records the indices that each search in the block takes, in order: argmin, argmax, min, max and this package's kernels.

    Which of two codes a search takes whose distances to a vector differ by rounding only depends on the order of additions, so
    on the machine and its load.  Neither code is wrong, and all that follows from it (codes, losses, counts) is right, too.

    Args:
        followed: the choices of another run.  A search of a matrix takes those of the search in the same place, where they tie
            with its own.
        original: the choices of the original in its own precision, whose errors say what ties.

    Attributes:
        taken: the indices of each search.
    """

    def __init__(self, followed: Sequence[Tensor] = (), original: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._followed, self._original = followed, original
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
        further = self._further(self._followed, matrix, dim, indices, largest)
        if further is None:
            return
        scale = matrix.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim).reshape(indices.shape)
        allowed = _ROUNDINGS * torch.finfo(torch.float32).eps * scale
        own = self._further(self._original, matrix, dim, indices, largest)
        if own is not None:
            allowed = allowed.clamp(min=_FACTOR * float(own.nan_to_num(0.0, 0.0, 0.0).max()))
        wanted = self._followed[len(self.taken)].to(indices.device).reshape(indices.shape)
        indices.copy_(torch.where(further <= allowed, wanted, indices))

    def _further(
        self, choices: Sequence[Tensor], matrix: Tensor, dim: int, indices: Tensor, largest: bool
    ) -> Tensor | None:
        """By how much the choices of another run in this place are farther than ``indices``; None if they do not fit."""
        place = len(self.taken)
        if place >= len(choices) or choices[place].numel() != indices.numel() or not matrix.numel():
            return None
        taken = choices[place].to(indices.device).reshape(indices.shape)
        if int(taken.min()) < 0 or int(taken.max()) >= matrix.shape[dim]:
            return None
        keep = indices.shape if indices.dim() == matrix.dim() else indices.unsqueeze(dim).shape
        best, found = (matrix.gather(dim, each.reshape(keep)).reshape(indices.shape) for each in (indices, taken))
        return best - found if largest else found - best


def _dimension(args: tuple, kwargs: dict | None) -> int | None:
    """The dimension of a matrix that an operator searches; None if it is no search along one dimension."""
    dim: Any = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
    floating = isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].dim() > 1
    return dim if floating and isinstance(dim, int) else None
