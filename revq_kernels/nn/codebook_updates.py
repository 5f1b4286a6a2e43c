"""What sets and moves the codes of a quantizer apart from the optimizer.

Initial codes (drawn vectors, k-means), moving averages, replacement of dead codes, and codes that a projector makes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revq_kernels.functional import count_codes_, nearest_code, segment_sum


@dataclass(frozen=True)
class CodeStatistics:
    """What one training call found out about the codes.  Both parts are sums over queries, so processes can add theirs."""

    count: Tensor
    """int64 ``[G, K]``: how many queries selected each code."""
    total: Tensor | None
    """float32 ``[G, K, d]``: the sum of the queries that selected each code; None if no update needs it."""


class EMAUpdate(nn.Module):
    """Exponential moving averages as codes (van den Oord et al. 2017, appendix A.1).

    Each training call of the `FastChannelVQ` that it is given to (``update=EMAUpdate()``) moves, after the search,

        cluster_size <- decay cluster_size + (1 - decay) number of vectors that selected each code
        embed_sum    <- decay embed_sum    + (1 - decay) sum of those vectors
        code         <- embed_sum / cluster_size, with cluster_size smoothed (Laplace): (c + eps) / (n + K eps) n

    with n the sum of cluster_size over the codebook.  The codebook then takes no gradient, and the loss is the
    commitment term alone.  The sums are exact counts and the ordered `segment_sum`: no one-hot matrix, and equal bits in
    every run on the CPU.  With several processes, each averages its own vectors only.

    Args:
        decay: share of the averages that a call keeps, in [0, 1).
        eps: the smoothing, in units of selections; > 0.

    Attributes (float32 also where the model is cast to another dtype):
        cluster_size: buffer float32 ``[G, K]``, 1 at the beginning.
        embed_sum: buffer float32 ``[G, K, d]``, the codes at the beginning.

    Raises:
        ValueError: for options out of range, or an object given to two quantizers.
    """

    cluster_size: Tensor
    embed_sum: Tensor

    def __init__(self, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a share in [0, 1), got {decay}")
        if not eps > 0:
            raise ValueError(f"eps: expected a number > 0, got {eps}")
        self.decay, self.eps = decay, eps

    def bind(self, codebook: nn.Parameter) -> None:
        """Create the averages of a codebook ``[G, K, d]``, which stops taking gradients."""
        if hasattr(self, "embed_sum"):
            raise ValueError("update: expected an EMAUpdate of its own, got one that another quantizer uses")
        codebook.requires_grad_(False)
        self.register_buffer("cluster_size", torch.ones_like(codebook[..., 0]))
        self.register_buffer("embed_sum", codebook.detach().clone())

    @torch.no_grad()
    def apply_(self, codebook: Tensor, statistics: CodeStatistics) -> None:
        """One update of codebook ``[G, K, d]`` by the statistics of a call."""
        self.cluster_size.mul_(self.decay).add_(statistics.count, alpha=1 - self.decay)
        assert statistics.total is not None  # the quantizer sums it for an update
        self.embed_sum.mul_(self.decay).add_(statistics.total, alpha=1 - self.decay)
        size = self.cluster_size.sum(dim=1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (size + self.cluster_size.shape[1] * self.eps) * size
        mean = self.embed_sum / smoothed[..., None]
        codebook.copy_(torch.where(smoothed[..., None] > 0, mean, codebook))  # 0: no selection so far, hence no mean

    @torch.no_grad()
    def restart_(self, codebook: Tensor, moved: Tensor) -> None:
        """Restart the averages at the codes of moved bool ``[G, K]``; the old ones would move these codes back."""
        self.cluster_size.masked_fill_(moved, 1.0)
        self.embed_sum.copy_(torch.where(moved[..., None], codebook, self.embed_sum))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EMAUpdate":
        """Keep the averages in float32 when the model is cast: in bfloat16, increments of 1 % round to nothing."""
        averages = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, average in averages.items():
            setattr(self, name, average.to(getattr(self, name).device))
        return self


class ReplaceDeadCodes(nn.Module):
    """Replace rarely used codes by vectors of the batch (Dhariwal et al. 2020, section 3.1; Zeghidour et al. 2021, III-C).

    Selections are counted over windows of ``every`` training calls.  The call after a window begins by replacing, before
    its own search, each code that was selected less than ``threshold`` times in the window by a vector of the batch: no
    vector twice if there are enough, and no masked vector.  So a replaced code is selected in the same call, and an
    `EMAUpdate` restarts at its new value.  (EnCodec's ``threshold_ema_dead_code=2`` is about ``threshold=2 * every``.)
    `FastChannelVQ.reset_` is the paper's policy, which the training loop calls.

    Shapes do not depend on data, so a device is never waited for.  With several processes, each would replace codes by
    vectors of its own batch; use it in one process.

    Args:
        threshold: selections per window below which a code is replaced.
        every: training calls per window.
        generator: source of the draw, on the codebook's device.

    Attributes:
        used: buffer int64 ``[G, K]``, selections in this window.
        calls: buffer int64 scalar, training calls in this window.
        moved: buffer bool ``[G, K]``, not saved: the codes that the last training call replaced, whose optimizer state
            the caller should clear.

    Raises:
        ValueError: for options out of range, or an object given to two quantizers.
    """

    used: Tensor
    calls: Tensor
    moved: Tensor

    def __init__(self, threshold: int = 1, every: int = 100, generator: torch.Generator | None = None) -> None:
        super().__init__()
        for name, value in (("threshold", threshold), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        self.threshold, self.every, self.generator = threshold, every, generator

    def bind(self, codebook: Tensor) -> None:
        """Create the counters of a codebook ``[G, K, d]``."""
        if hasattr(self, "used"):
            raise ValueError("dead_codes: expected a ReplaceDeadCodes of its own, got one that another quantizer uses")
        shape, device = codebook.shape[:2], codebook.device
        self.register_buffer("used", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("moved", torch.zeros(shape, dtype=torch.bool, device=device), persistent=False)

    @torch.no_grad()
    def replace_(self, codebook: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
        """At the end of a window, overwrite dead codes of codebook ``[G, K, d]`` by some of queries ``[N, G, d]``.

        Only queries where mask bool ``[N, G]`` is True are taken.  Returns `moved`.
        """
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

    @torch.no_grad()
    def apply_(self, statistics: CodeStatistics) -> None:
        """Add the selections of one call to the window."""
        self.used += statistics.count
        self.calls += 1

    def restart_(self) -> None:
        """Begin a new window, after the codes were set by other means."""
        self.used.zero_()
        self.calls.zero_()


class MappedCodes(nn.Module):
    """``projector(table)`` as the codes of a `FastChannelVQ` (``codes=MappedCodes(...)``): all codes move together.

    SimVQ (Zhu et al. 2024): a random table of width d and ``nn.Linear(d, d)``.  VQGAN-LC (Zhu et al. 2024): features of
    another network, of any width f, and ``nn.Linear(f, d)``.  Search, `decode` and gradients all use the mapped codes;
    the gradient goes through the selected codes into the projector.  The projector runs in float32 under autocast too,
    once per call.

    Args:
        table: ``[G, K, f]``, or ``[K, f]`` for one codebook.
        projector: a module from ``[G, K, f]`` to ``[G, K, d]``.

    Attributes:
        table: buffer float32 ``[G, K, f]``.

    Raises:
        ValueError: for a table of another rank.
    """

    table: Tensor

    def __init__(self, table: Tensor, projector: nn.Module) -> None:
        super().__init__()
        if table.dim() not in (2, 3):
            raise ValueError(f"table: expected [G, K, f] or [K, f], got shape {tuple(table.shape)}")
        self.register_buffer("table", table.detach().float().reshape(-1, *table.shape[-2:]).clone())
        self.projector = projector

    def forward(self) -> Tensor:
        """float32 ``[G, K, d]``."""
        with torch.autocast(self.table.device.type, enabled=False):
            return self.projector(self.table)


@torch.no_grad()
def initial_codebook(
    vectors: Tensor, mask: Tensor | None, num_codes: int, iterations: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """K vectors per group, drawn without replacement, then moved by Lloyd's iterations (k-means).

    Drawing with replacement would start with exact duplicate codes, of which only the lowest index is ever selected.

    Args:
        vectors: ``[N, G, d]``.
        mask: bool ``[N, G]``, which of them count, or None.
        num_codes: K.
        iterations: of Lloyd's algorithm; 0 keeps the drawn vectors.
        generator: source of the draws, on any device.

    Returns:
        float32 ``[G, K, d]``.

    Raises:
        ValueError: if a group has fewer than K vectors that count, or for negative iterations.
    """
    if iterations < 0:
        raise ValueError(f"iterations: expected an integer >= 0, got {iterations}")
    device = "cpu" if generator is None else generator.device
    codebook = []
    for group in range(vectors.shape[1]):
        rows = vectors[:, group] if mask is None else vectors[mask[:, group], group]
        if rows.shape[0] < num_codes:
            raise ValueError(
                f"x: expected at least num_codes={num_codes} vectors per group to draw from, got {rows.shape[0]}"
            )
        drawn = torch.randperm(rows.shape[0], generator=generator, device=device)[:num_codes]
        codes = rows[drawn.to(rows.device)].float()
        for _ in range(iterations):
            codes = _lloyd_step(rows, codes, generator)
        codebook.append(codes)
    return torch.stack(codebook)


def _lloyd_step(rows: Tensor, codes: Tensor, generator: torch.Generator | None) -> Tensor:
    """rows ``[n, d]``, codes ``[K, d]`` -> the mean of each code's rows; a code without rows becomes a random row."""
    mean, count = code_means(rows[:, None], nearest_code(rows[:, None], codes[None]), codes.shape[0])
    empty = count == 0  # [1, K]
    device = "cpu" if generator is None else generator.device
    drawn, _ = distinct_rows(empty.to(device), rows.shape[0], generator=generator)
    return torch.where(empty[0, :, None], rows[drawn[0].to(rows.device)].float(), mean[0])


@torch.no_grad()
def code_means(vectors: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The mean of the vectors ``[N, G, d]`` at each index ``[N, G]``, and how many: ``[G, K, d]`` and int64 ``[G, K]``.

    The mean of no vector is 0.
    """
    count = torch.zeros(vectors.shape[1], num_codes, dtype=torch.int64, device=vectors.device)
    count_codes_(count, indices)
    return segment_sum(vectors, indices, num_codes) / count.clamp(min=1)[..., None], count


def distinct_rows(
    wanted: Tensor, num_rows: int, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a row for each wanted place, without replacement within a group until its rows run out.

    Args:
        wanted: bool ``[G, K]``; the rows at other places are arbitrary.
        num_rows: N >= 1.
        mask: bool ``[N, G]``, the rows that may be drawn, or None.

    Returns:
        int64 ``[G, K]``, each in [0, N); and bool ``[G, 1]``, whether the group has a row at all.
    """
    device = wanted.device
    ticket = torch.rand(wanted.shape[0], num_rows, generator=generator, device=device)
    available = torch.full((wanted.shape[0], 1), num_rows, device=device)
    if mask is not None:
        ticket = torch.where(mask.T, ticket, 2.0)  # behind every row that may be drawn
        available = mask.sum(dim=0)[:, None]
    place = (wanted.long().cumsum(dim=1) - 1).clamp(min=0) % available.clamp(min=1)
    return ticket.argsort(dim=1).gather(1, place), available > 0
