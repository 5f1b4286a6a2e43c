"""What training calls find out about the codes: counts and sums of finite vectors, over all processes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revq_kernels.nn.processes import Processes
from revq_kernels.nn.recomputation import updates_apply

LARGEST_LENGTH = 2.0**63
"""Length of a vector beyond which it enters no statistics: its square, and sums of a batch, may overflow float32."""
COUNT_BITS = 12
"""A float32 sum of counts below 2^12 is exact over 2^12 processes, so a count travels in two parts."""


def finite_vectors(vectors: Tensor) -> Tensor:
    """Which of the vectors ``[..., d]`` may enter statistics: bool ``[...]``, False for NaN, infinite and huge ones."""
    return torch.linalg.vector_norm(vectors.detach(), dim=-1, dtype=torch.float32) <= LARGEST_LENGTH


@dataclass(frozen=True)
class CodeStatistics:
    """What one training call found out about the codes.  Both parts are sums over queries, so processes can add theirs."""

    count: Tensor
    """int64 ``[G, K]``: how many queries selected each code."""
    total: Tensor | None
    """float32 ``[G, K, d]``: the sum of the queries that selected each code; None if no update needs it."""

    def over(self, processes: Processes) -> "CodeStatistics":
        """The sums over all processes, by one exchange of float32."""
        if not processes.several():
            return self
        total = torch.empty(0, dtype=torch.float32, device=self.count.device) if self.total is None else self.total
        count = self.count.flatten()
        parts = [count & ((1 << COUNT_BITS) - 1), count >> COUNT_BITS, total.flatten()]
        low, high, sums = processes.sum(torch.cat([part.float() for part in parts])).split([p.numel() for p in parts])
        count = low.long() + (high.long() << COUNT_BITS)
        return CodeStatistics(count.view_as(self.count), None if self.total is None else sums.view_as(self.total))


class SkippedVectors(nn.Module):
    """How many vectors entered no statistics, because they are not finite.

    Attributes:
        number: buffer int64 scalar, not saved, of this process.
    """

    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.zeros((), dtype=torch.int64), persistent=False)
        self._warned = 0

    @torch.no_grad()
    def counted(self, vectors: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Which vectors ``[N, G, d]`` enter statistics: bool ``[N, G]``, None for all.

        Adds up the others, but those where mask bool ``[N, G]`` is False.
        """
        usable = finite_vectors(vectors)
        if weight is not None:
            usable &= finite_vectors(weight)
        known = _readable(vectors) and vectors.device.type == "cpu"  # on another device the host would wait
        if known and bool(usable.all()):
            return mask
        skipped = (~usable if mask is None else mask & ~usable).sum()
        applies = updates_apply(vectors)
        self.number.add_(skipped if applies is None else skipped * applies)
        if known:
            self.warn()
        return usable if mask is None else usable & mask

    def warn(self) -> None:
        """Warn of such vectors, at the first and whenever there are twice as many.  On a GPU the host waits for it."""
        if not _readable(self.number) or int(self.number) < max(1, 2 * self._warned):
            return
        self._warned = int(self.number)
        warnings.warn(
            f"x: expected finite vectors, got {self._warned} so far with NaN, infinite or huge elements, which entered no "
            "counts, averages or codes",
            stacklevel=2,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SkippedVectors":
        """Convert as any module does; what had no data, on the meta device, is 0."""
        empty = self.number.is_meta
        super()._apply(fn, recurse)
        if empty:
            self.number.zero_()
        return self


def _readable(tensor: Tensor) -> bool:
    """Whether a tensor has values: not in a trace, on the meta device, or as a fake tensor or another subclass."""
    return not (torch.compiler.is_compiling() or tensor.is_meta) and type(tensor) in (Tensor, nn.Parameter)


def follow_(module: nn.Module | None, place: Tensor) -> None:
    """Move a module's own buffers to the device of ``place``; there, those that had no data, on the meta device, are 0."""
    for name, buffer in [] if module is None else list(module.named_buffers(recurse=False)):
        empty = buffer.is_meta and not place.is_meta
        setattr(module, name, torch.zeros_like(buffer, device=place.device) if empty else buffer.to(place.device))
