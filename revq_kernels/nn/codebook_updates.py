"""What sets and moves the codes of a quantizer apart from the optimizer.

Initial codes (drawn vectors, k-means), moving averages, replacement of dead codes, and codes that a projector makes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels.functional import count_codes_, nearest_code, segment_sum
from revq_kernels.nn.processes import NOT_DRAWN, Processes
from revq_kernels.nn.statistics import CodeStatistics, finite_vectors


class EMAUpdate(nn.Module):
    """Exponential moving averages as codes (van den Oord et al. 2017, appendix A.1).

    Each training call of the `FastChannelVQ` that it is given to (``update=EMAUpdate()``) moves, after the search,

        cluster_size <- decay cluster_size + (1 - decay) number of vectors that selected each code
        embed_sum    <- decay embed_sum    + (1 - decay) sum of those vectors
        code         <- embed_sum / cluster_size, with cluster_size smoothed (Laplace): (c + eps) / (n + K eps) n

    with n the sum of cluster_size over the codebook.  The codebook then takes no gradient, and the loss is the
    commitment term alone.  The sums are exact counts and the ordered `segment_sum`: no one-hot matrix, and equal bits in
    every run on the CPU.  Several processes average the vectors of all (`FastChannelVQ`).

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
    def apply_(self, codebook: Tensor, statistics: CodeStatistics, applies: Tensor | None = None) -> None:
        """One update of codebook ``[G, K, d]`` by the statistics of a call, unless ``applies`` bool scalar is False."""
        assert statistics.total is not None  # the quantizer sums it for an update
        cluster_size = self.cluster_size.mul(self.decay).add_(statistics.count, alpha=1 - self.decay)
        embed_sum = self.embed_sum.mul(self.decay).add_(statistics.total, alpha=1 - self.decay)
        size = cluster_size.sum(dim=1, keepdim=True)
        smoothed = (cluster_size + self.eps) / (size + cluster_size.shape[1] * self.eps) * size
        mean = embed_sum / smoothed[..., None]
        moved = smoothed[..., None] > 0  # 0: no selection so far, hence no mean
        if applies is not None:
            cluster_size = torch.where(applies, cluster_size, self.cluster_size)
            embed_sum, moved = torch.where(applies, embed_sum, self.embed_sum), moved & applies
        self.cluster_size.copy_(cluster_size)
        self.embed_sum.copy_(embed_sum)
        codebook.copy_(torch.where(moved, mean, codebook))

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
            converted = getattr(self, name)
            kept = torch.ones_like(converted, dtype=torch.float32) if average.is_meta else average.to(converted.device)
            setattr(self, name, kept)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as any module does; averages that are assigned, not copied, become float32."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, average in list(self.named_buffers()):
            setattr(self, name, average.float())


class ReplaceDeadCodes(nn.Module):
    """Replace rarely used codes by vectors of the batch (Dhariwal et al. 2020, section 3.1; Zeghidour et al. 2021, III-C).

    Selections are counted over windows of ``every`` training calls.  The call after a window begins by replacing, before
    its own search, each code that was selected less than ``threshold`` times in the window by a vector of the batch: no
    vector twice if there are enough, and no masked vector.  So a replaced code is selected in the same call, and an
    `EMAUpdate` restarts at its new value.  (EnCodec's ``threshold_ema_dead_code=2`` is about ``threshold=2 * every``.)
    `FastChannelVQ.reset_` is the paper's policy, which the training loop calls.

    Shapes do not depend on data, so a device is never waited for.  Several processes draw from the vectors of all, and
    replace the same codes by the same vectors (`FastChannelVQ`).

    Args:
        threshold: selections per window below which a code is replaced.
        every: training calls per window.
        generator: source of this process's draws, on the codebook's device.

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
    def replace_(
        self,
        codebook: Tensor,
        queries: Tensor,
        mask: Tensor | None,
        processes: Processes,
        applies: Tensor | None = None,
    ) -> Tensor:
        """At the end of a window, overwrite dead codes of codebook ``[G, K, d]`` by some of queries ``[N, G, d]``.

        Only queries where mask bool ``[N, G]`` is True are taken.  ``applies`` bool scalar: False changes nothing.
        Returns `moved`.
        """
        due = self.calls >= self.every
        if applies is not None:
            due = due & applies
        dead = (self.used < self.threshold) & due
        tickets, rows = processes.lowest(*self._candidates(queries, mask, codebook.shape[1]))
        available = (tickets < NOT_DRAWN).sum(dim=1, keepdim=True)
        rows = rows.gather(1, _places(dead, available)[..., None].expand_as(rows)).to(codebook.dtype)
        moved = dead & (available > 0)
        codebook.copy_(torch.where(moved[..., None], rows, codebook))
        self.moved.copy_(moved if applies is None else torch.where(applies, moved, self.moved))
        self.used.masked_fill_(due, 0)
        self.calls.masked_fill_(due, 0)
        return moved

    def draw_again(self, queries: Tensor) -> None:
        """Advance the default generator as `replace_` did, for what a checkpoint draws after it when it runs again."""
        if self.generator is None:
            _tickets(queries.shape[1], queries.shape[0], None, None, queries.device)

    def _candidates(self, queries: Tensor, mask: Tensor | None, num_codes: int) -> tuple[Tensor, Tensor]:
        """K of the queries, drawn without replacement: tickets ``[G, K]`` and rows float32 ``[G, K, d]``.

        Where there are fewer, `NOT_DRAWN` and arbitrary rows follow.
        """
        num_rows, num_groups, code_dim = queries.shape
        if num_rows == 0:
            rows = queries.new_zeros(num_groups, num_codes, code_dim, dtype=torch.float32)
            return torch.full_like(rows[..., 0], NOT_DRAWN), rows
        tickets, _ = _tickets(num_groups, num_rows, mask, self.generator, queries.device)
        tickets, order = F.pad(tickets, (0, num_codes), value=NOT_DRAWN).sort(dim=1)
        order = order[:, :num_codes].clamp(max=num_rows - 1)
        rows = queries.transpose(0, 1).gather(1, order[..., None].expand(num_groups, num_codes, code_dim))
        return tickets[:, :num_codes], rows.float()

    @torch.no_grad()
    def apply_(self, statistics: CodeStatistics, applies: Tensor | None = None) -> None:
        """Add the selections of one call to the window, unless ``applies`` bool scalar is False: then they are 0."""
        self.used.add_(statistics.count)
        self.calls.add_(1 if applies is None else applies.long())

    def restart_(self) -> None:
        """Begin a new window, after the codes were set by other means."""
        self.used.zero_()
        self.calls.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ReplaceDeadCodes":
        """Convert as any module does; counters that had no data, on the meta device, are 0."""
        empty = [name for name, counter in self.named_buffers() if counter.is_meta]
        super()._apply(fn, recurse)
        for name in empty:
            getattr(self, name).zero_()
        return self


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
        with torch.inference_mode(False):  # a table made in that mode could not be trained through outside it
            self.register_buffer("table", table.detach().float().reshape(-1, *table.shape[-2:]).clone())
        self.projector = projector

    def forward(self) -> Tensor:
        """float32 ``[G, K, d]``."""
        if self.table.is_meta:  # autocast does not know the device
            return self._mapped()
        with torch.autocast(self.table.device.type, enabled=False):
            return self._mapped()

    def _mapped(self) -> Tensor:
        """In the dtype of the projector, which float64 as the default dtype may be; codes may not."""
        like = next((p for p in self.projector.parameters() if p.is_floating_point()), self.table)
        codes: Tensor = self.projector(self.table.to(like.dtype))
        return codes.float() if codes.dtype == torch.float64 else codes


@torch.no_grad()
def initial_codebook(
    vectors: Tensor, mask: Tensor | None, num_codes: int, iterations: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """K vectors per group, drawn without replacement, then moved by Lloyd's iterations (k-means).

    Drawing with replacement would start with exact duplicate codes, of which only the lowest index is ever selected.

    Args:
        vectors: ``[N, G, d]``.
        mask: bool ``[N, G]``, which of them count, or None.  Those that are not finite never do.
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
    codebook, finite = [], finite_vectors(vectors)
    mask = finite if mask is None else mask & finite
    for group in range(vectors.shape[1]):
        rows = vectors[mask[:, group], group]
        if rows.shape[0] < num_codes:
            raise ValueError(
                f"x: expected at least num_codes={num_codes} vectors per group to draw from, got {rows.shape[0]} finite ones"
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
    tickets, available = _tickets(wanted.shape[0], num_rows, mask, generator, wanted.device)
    return tickets.argsort(dim=1).gather(1, _places(wanted, available)), available > 0


def _tickets(
    num_groups: int, num_rows: int, mask: Tensor | None, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A random number per row, `NOT_DRAWN` where the mask is False: float32 ``[G, N]``; and the rows left, ``[G, 1]``."""
    # the overload that takes a generator takes no dynamic shape, not even with None
    options: dict[str, Any] = {} if generator is None else {"generator": generator}
    tickets = torch.rand(num_groups, num_rows, dtype=torch.float32, device=device, **options)
    if mask is None:
        return tickets, torch.full((num_groups, 1), num_rows, device=device)
    return torch.where(mask.T, tickets, NOT_DRAWN), mask.sum(dim=0)[:, None]


def _places(wanted: Tensor, available: Tensor) -> Tensor:
    """The rank among the drawn rows for each wanted place bool ``[G, K]``: 0, 1, ..., again from 0 when they run out."""
    return (wanted.long().cumsum(dim=1) - 1).clamp(min=0) % available.clamp(min=1)
