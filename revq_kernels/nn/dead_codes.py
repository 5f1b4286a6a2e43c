"""Codes that nearly nothing chooses take vectors of the batch."""

import torch
from torch import Tensor, nn


class ReplaceDeadCodes(nn.Module):
    """Restart little used codes from the batch (Dhariwal et al. 2020, section 3.1; Zeghidour et al. 2021, section III-C).

    Choices are counted over windows of ``every`` training calls.  The call after a window begins by replacing, before
    its own search, each code that was chosen less than ``threshold`` times in it by a vector of the batch: no vector
    twice where there are enough, none that is masked.  So a replaced code is chosen in the same call, and an `EMAUpdate`
    begins anew there.  (EnCodec's ``threshold_ema_dead_code=2`` is about ``threshold=2 * every``.)  `FastChannelVQ.reset_`
    is the paper's other policy, called by the training loop.

    Shapes do not depend on data, and the host waits for nothing.  Several processes: each would replace by its own
    batch, so use it in one process.

    Args:
        threshold: choices per window below which a code is replaced.
        every: training calls per window.
        generator: source of the draw, on the codebook's device.

    Attributes:
        used: buffer int64 ``[G, K]``, choices in this window.
        calls: buffer int64 scalar, training calls in this window.
        moved: buffer bool ``[G, K]``, not saved: the codes that the last training call replaced, whose optimizer state
            the caller should clear.

    Raises:
        ValueError: for options out of range, or an object given to two quantizers.
    """

    def __init__(self, threshold: int = 1, every: int = 100, generator: torch.Generator | None = None) -> None:
        super().__init__()
        for name, value in (("threshold", threshold), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        self.threshold, self.every, self.generator = threshold, every, generator

    def bind(self, codebook: Tensor) -> None:
        """Make the counters of a codebook ``[G, K, d]``."""
        if hasattr(self, "used"):
            raise ValueError("dead_codes: expected a ReplaceDeadCodes of its own, got one that another quantizer uses")
        shape, device = codebook.shape[:2], codebook.device
        self.register_buffer("used", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("moved", torch.zeros(shape, dtype=torch.bool, device=device), persistent=False)

    @torch.no_grad()
    def step_(self, codebook: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
        """Replace in codebook ``[G, K, d]`` by queries ``[N, G, d]``, of which mask bool ``[N, G]`` counts; returns `moved`."""
        due = self.calls >= self.every
        dead = (self.used < self.threshold) & due
        if queries.shape[0]:
            source, enough = distinct_rows(dead, queries.shape[0], mask, self.generator)
            self.moved.copy_(dead & enough)
            rows = queries.transpose(0, 1).gather(1, source[..., None].expand(codebook.shape)).to(codebook.dtype)
            codebook.copy_(torch.where(self.moved[..., None], rows, codebook))
        else:
            self.moved.zero_()
        self.used.masked_fill_(due, 0)
        self.calls.masked_fill_(due, 0)
        return self.moved

    def restart_(self) -> None:
        """Begin a window, for codes that were set by other means."""
        self.used.zero_()
        self.calls.zero_()

    @torch.no_grad()
    def count_(self, count: Tensor) -> None:
        """Add one call's choices int64 ``[G, K]``."""
        self.used += count
        self.calls += 1


def distinct_rows(
    wanted: Tensor, num_rows: int, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a row for each wanted place, without replacement within a group until its rows run out.

    Args:
        wanted: bool ``[G, K]``; the other places get rows of no meaning.
        num_rows: N >= 1.
        mask: bool ``[N, G]``, the rows that may be drawn, or None.

    Returns:
        int64 ``[G, K]``, each in [0, N); and bool ``[G, 1]``, whether the group has a row at all.
    """
    device = wanted.device
    ticket = torch.rand(wanted.shape[0], num_rows, generator=generator, device=device)
    available = torch.full((wanted.shape[0], 1), num_rows, device=device)
    if mask is not None:
        ticket = torch.where(mask.T, ticket, 2.0)
        available = mask.sum(dim=0)[:, None]
    place = (wanted.long().cumsum(dim=1) - 1).clamp(min=0) % available.clamp(min=1)
    return ticket.argsort(dim=1).gather(1, place), available > 0
