"""`FastChannelVQ`: the operations as a quantizer module, in the order of a call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels import functional
from revq_kernels.index import CodebookIndex
from revq_kernels.nn.codebook_updates import EMAUpdate, ReplaceDeadCodes, initial_codebook
from revq_kernels.nn.layout import Layout, Split, TokenLayout
from revq_kernels.nn.losses import Estimator, check_loss_options, estimate, loss_weights, vq_losses
from revq_kernels.nn.output import OutputFormat, QuantizerDetails, default_format
from revq_kernels.nn.recomputation import apart, recomputing, updates_apply
from revq_kernels.nn.state import QuantizerState
from revq_kernels.nn.statistics import CodeStatistics, finite_vectors
from revq_kernels.validation import COSINES, check_index_range, check_indices, check_quantizer


class FastChannelVQ(QuantizerState):
    """Vector quantization by exact nearest-code search, without a distance matrix.

    Takes latents, which it cuts into tokens, or tokens ``[B, T, d]``.  Token t uses codebook t mod G (as the released
    ReVQ code; with one codebook per token, G = T, it is simply codebook t).  T comes from the input.

    ``loss = mse(x.detach(), quantized) + commitment * mse(x, quantized.detach())``, in float32.

    Vectors that are NaN, infinite or longer than 2^63 enter no statistics: no counts, averages, replacements or initial
    codes.  A warning says how many there were.

    Several processes (``process_group``): a call in training mode sums counts, and what moves the codes, over all
    processes, so every process must make the call, and `reset_` and `initialize_` too, if with no vector at all.  Codes and
    counts then are equal bit for bit everywhere.  Eval mode exchanges nothing.  Codes with an update cannot be sharded.

    Activation checkpointing: a forward pass that runs again in a backward pass changes and exchanges nothing, and sees the
    codes of its first run.

    Args:
        num_codes: K, codes per codebook.
        code_dim: d, elements per code.
        num_groups: G, codebooks.
        layout: of the latents, "BCHW", "BLC", "BDT", "BTCHW" or "BCDHW".  None: four dimensions are BCHW, three are
            tokens ``[B, T, d]``, which are not cut.
        split: how latents are cut: "channel" (paper, section 3.2.1), "space" (a position's channels; with d = C the
            usual VQ layer) or "flat" (see `split_tokens`).
        metric: "l2"; "cosine" (tokens and codes are normalized, and all results are about the normalized ones);
            "cosine_lookup" (normalized for the search alone); "inner_product" (the largest); or "diagonal" (with a
            ``weight`` per call).  The last two run on the reference (`explain`).
        commitment: weight of the loss that moves x to its code; 0 switches it off.
        legacy_beta: put that weight on the other term, as VQGAN's code does (see `loss_weights`).
        loss_in_eval: False makes the loss 0 in eval mode.
        estimator: "straight_through" passes the gradient of ``quantized`` to x unchanged, "rotation" rotates and scales
            it (see `Rotation`), "none", as in ReVQ, passes it to the codebook.
        deterministic: whether the codebook's gradient has the same bits in every run, as for `quantize`.
        update: `EMAUpdate`: averages move the codes instead of a gradient.
        codes: a module that makes the codes ``[G, K, d]`` in place of a codebook, such as `MappedCodes`.
        dead_codes: `ReplaceDeadCodes`: rarely used codes are replaced during training.
        process_group: "auto", the default group if torch.distributed is initialized; None: this process alone; or a group.
        output_format: makes the result of a call, such as a function of `revq_kernels.interop.formats`; None:
            `QuantizerOutput`.
        impl: which implementation searches, as for `nearest_code`.

    Attributes:
        codebook: parameter float32 ``[G, K, d]``, standard normal until `initialize_` or training changes it; None with
            ``codes``.
        count: buffer int64 ``[G, K]``: selections of each code in training mode since the last `reset_`.

    Raises:
        ValueError: for sizes below 1, an unknown option, a negative commitment, or objects that do not go together.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        num_groups: int = 1,
        layout: Layout | None = None,
        split: Split = "channel",
        metric: str = "l2",
        commitment: float = 0.25,
        legacy_beta: bool = False,
        loss_in_eval: bool = True,
        estimator: Estimator = "straight_through",
        deterministic: bool = True,
        update: EMAUpdate | None = None,
        codes: nn.Module | None = None,
        dead_codes: ReplaceDeadCodes | None = None,
        process_group: Any = "auto",
        output_format: OutputFormat | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_quantizer(
            num_codes, code_dim, num_groups, metric, impl
        )  # all checks come before `bind`, which has effects
        check_loss_options(commitment, estimator)
        if codes is not None and (update is not None or dead_codes is not None):
            raise ValueError("codes: expected None beside update or dead_codes, which move a codebook, got a module")
        if output_format is not None and not callable(output_format):
            raise ValueError(f"output_format: expected a function or None, got {output_format!r}")
        self.token_layout = TokenLayout(code_dim, num_groups, layout, split)
        self.num_codes, self.code_dim, self.num_groups = num_codes, code_dim, num_groups
        self.metric, self.impl, self.deterministic = metric, impl, deterministic
        self.commitment, self.legacy_beta, self.loss_in_eval = commitment, legacy_beta, loss_in_eval
        self.estimator, self.output_format = estimator, output_format or default_format
        self._create(num_groups, num_codes, code_dim, update, codes, dead_codes, process_group)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None, weight: Tensor | None = None
    ) -> Any:
        """Quantize latents or tokens ``x``; in training mode also count, and update and replace codes.

        Args:
            mask: bool ``[B, L]``, False for positions that do not count: they keep their value, get index -1, and enter
                neither loss nor counts nor the codes.  ``[B, 1]`` masks whole samples, for any split.
            lengths: int64 ``[B]`` in place of a mask: how many leading positions count.
            weight: for ``metric="diagonal"``, in x's shape.

        Returns:
            ``quantized`` in x's shape and dtype, ``indices`` int64 ``[B, T]``, ``loss`` a float32 scalar (0 for an
            empty batch), unless ``output_format`` makes something else of them.

        Raises:
            ValueError: if x has another rank, d does not fit, T is not a multiple of ``num_groups``, or a mask, lengths or
                a weight do not fit x.
        """
        return self.output_format(self.quantize(x, mask=mask, lengths=lengths, weight=weight), self)

    def quantize(
        self, x: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None, weight: Tensor | None = None
    ) -> QuantizerDetails:
        """As `forward`, before the output format."""
        # 1. Latents to tokens, tokens to queries of each group.
        tokens = self.token_layout.tokens(x)  # [B, T, d]
        token_mask = self.token_layout.mask(x, mask, lengths)  # [B, T]
        query_mask = None if token_mask is None else self.token_layout.by_group(token_mask)  # [N, G]
        vectors = self._vectors(tokens, query_mask)  # [N, G, d]
        queries, weight = self._in_metric(vectors), self._weight(weight)
        changes = self.training and not recomputing()
        with apart():
            counted = (
                self.skipped.counted(vectors, weight, query_mask) if changes else query_mask
            )  # [N, G], None for all
            applies = updates_apply(vectors) if changes else None

        # 2. The search.  Dead codes are replaced before it, so that this call can select the new ones.
        if self.training and self.dead_codes is not None:
            with apart():
                if changes:
                    self._replace_dead_codes(queries, counted, applies)
                else:
                    self.dead_codes.draw_again(queries)
        moving = self.update is not None or self.dead_codes is not None
        codes = self._codes_of_call(queries) if moving and self.training else self.current_codes()
        # If nothing else follows, the search adds its counts to the buffer itself.
        follows = moving or applies is not None or self.processes.several()
        count = self.count
        if (
            changes and follows
        ):  # by its shape: a compiled checkpoint would save a buffer that is only read for its shape
            count = torch.zeros(self.count.shape, dtype=torch.int64, device=vectors.device)
        quantized, indices = self._search(queries, codes, weight, query_mask, counted, count if changes else None)

        # 3. What follows a selection: statistics -> reduce -> apply.  The result keeps the codes as they were.
        if changes and follows:
            with apart():
                statistics = self._reduce_statistics(self._statistics(queries, indices, counted, count))
                self._apply_statistics(statistics, applies)

        # 4. Loss, gradient for x, and the shape of x again.
        inputs, quantized = queries.reshape(tokens.shape), quantized.reshape(tokens.shape)
        indices = indices.reshape(tokens.shape[:2])
        weights = loss_weights(self.commitment, self.legacy_beta, learned_codes=self.update is None)
        losses = (torch.zeros((), device=x.device, dtype=torch.float32),) * 3
        if self.training or self.loss_in_eval:
            losses = vq_losses(inputs, quantized, token_mask, weights)
        quantized = estimate(self.estimator, inputs, quantized).to(x.dtype)
        if token_mask is not None:
            quantized = torch.where(token_mask[..., None], quantized, tokens)
            indices = indices.masked_fill(~token_mask, -1)
        by_position = self.token_layout.by_position(indices, x)
        return QuantizerDetails(self.token_layout.restore(quantized, x), indices, *losses, weights, x, by_position)

    def encode(self, x: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """The indices of latents or tokens ``x``: int64 ``[B, T]``; counts nothing."""
        tokens = self.token_layout.tokens(x)
        queries = self._in_metric(self._vectors(tokens, None))
        indices = self._nearest(queries, self.current_codes(), self._weight(weight))
        return indices.reshape(tokens.shape[:2])

    def decode(self, indices: Tensor, latent_shape: tuple[int, ...] | None = None) -> Tensor:
        """The codes of ``indices`` int64 ``[B, T]``, zeros for -1: ``[B, T, d]``, or latents ``[B, *latent_shape]``.

        Raises:
            ValueError: if T is not a multiple of ``num_groups``, an index is not in [-1, K), or the shape does not fit.
            TypeError: for another dtype.
        """
        check_indices(indices)
        if indices.dim() != 2 or indices.shape[1] % self.num_groups:
            raise ValueError(
                f"indices: expected [B, T] with T a multiple of num_groups={self.num_groups}, got {tuple(indices.shape)}"
            )
        masked = indices == -1
        indices = indices.masked_fill(masked, 0)
        check_index_range(indices, self.num_codes)
        group = torch.arange(indices.shape[1], device=indices.device) % self.num_groups
        tokens = self.current_codes()[group, indices].masked_fill(masked[..., None], 0)
        return tokens if latent_shape is None else self.token_layout.latents(tokens, latent_shape)

    def current_codes(self) -> Tensor:
        """``[G, K, d]``: the rows that `decode` returns: the codebook or ``codes``, normalized for ``metric="cosine"``.

        Raises:
            ValueError: if ``codes`` makes another shape.
        """
        if self.codes is None:
            return self._in_metric(self._own_codebook())
        codes, shape = self.codes(), (*self.count.shape, self.code_dim)
        if tuple(codes.shape) != shape:
            raise ValueError(f"codes: expected a module that makes [G, K, d] = {shape}, got {tuple(codes.shape)}")
        return self._in_metric(codes)

    @torch.no_grad()
    def build_index(self) -> CodebookIndex:
        """Build an exact search tree over the codes as they are, for the searches of eval mode on the CPU.

        The tree is a snapshot: it answers for the codes it was built from, even if ``codebook.data`` is changed in place
        afterwards, which nothing can detect.  ``train()``, ``load_state_dict``, ``to`` and the like, `reset_` and
        `initialize_` drop it; a copy or a pickle of the module is without it.  Results are those of the search over all
        codes, bit for bit.  It is worth its time where a large codebook of small d (up to about 8) is searched often:
        for tokenizing a data set (docs/benchmarks.md has the times of build and search).

        Returns:
            The tree; also `index`, until it is dropped.

        Raises:
            RuntimeError: in training mode, in which codes move.
            ValueError: for a metric that is not an l2 search, an ``impl`` other than "auto" or "native", or codes that
                are not on the CPU.
            NativeUnavailableError: without the compiled library.
        """
        if self.training:
            raise RuntimeError("build_index: expected eval mode, in which codes do not move, got training mode")
        if self.metric not in ("l2", *COSINES):
            raise ValueError(f"metric: expected 'l2', 'cosine' or 'cosine_lookup' for a tree, got {self.metric!r}")
        if self.impl not in ("auto", "native"):
            raise ValueError(f"impl: expected 'auto' or 'native' for a tree, which is C++, got {self.impl!r}")
        codes = self.current_codes()
        self._index = CodebookIndex(_normalized(codes) if self.metric == "cosine_lookup" else codes)
        return self._index

    @property
    def index(self) -> CodebookIndex | None:
        """The tree that eval mode searches; None without `build_index`."""
        return self._index

    @torch.no_grad()
    def initialize_(
        self,
        x: Tensor,
        *,
        iterations: int = 0,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set each codebook to K vectors of ``x`` (as for `forward`) without replacement, or to k-means (`initial_codebook`).

        Several processes draw from the vectors of all.

        Raises:
            ValueError: if a group has fewer than K finite vectors that count, or ``codes`` makes the codes.
        """
        tokens, token_mask = self.token_layout.tokens(x), self.token_layout.mask(x, mask, lengths)
        query_mask = None if token_mask is None else self.token_layout.by_group(token_mask)
        vectors, codebook = self._vectors(tokens, query_mask), self._whole_codebook()
        self.skipped.counted(vectors, None, query_mask)
        self.skipped.warn()
        usable = finite_vectors(vectors) if query_mask is None else finite_vectors(vectors) & query_mask
        queries = self.processes.gather(self._in_metric(vectors).float())
        usable = self.processes.gather(usable.int()).bool()
        codebook.copy_(initial_codebook(queries, usable, self.num_codes, iterations, generator))
        self.processes.broadcast_(codebook)
        self._restart_averages(torch.ones_like(self.count, dtype=torch.bool))
        self._restart_count()

    def reset_(
        self,
        *,
        noise: float = 0.1,
        max_fraction: float = 1.0,
        pairing: str = "paper",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Move the codes without a selection since the last call (see `reset_codes_`), then count from zero.

        Several processes take the codes of the first.

        Returns:
            bool ``[G, K]``: the moved rows, whose optimizer state the caller should clear.

        Raises:
            ValueError: for options out of range, or if ``codes`` makes the codes.
        """
        codebook = self._whole_codebook()
        self.skipped.warn()
        moved = functional.reset_codes_(
            codebook,
            self.count,
            noise=noise,
            max_fraction=max_fraction,
            pairing=pairing,
            generator=generator,
        )
        self.processes.broadcast_(codebook.detach())
        self._restart_averages(moved)
        self._restart_count()
        return moved

    @property
    def utilization(self) -> Tensor:
        """float32 ``[G]``: share of each codebook's codes that were counted at least once."""
        self.skipped.warn()
        return functional.utilization(self.count)

    @property
    def perplexity(self) -> Tensor:
        """float32 ``[G]``: exp of the entropy of the counted selections, between 1 and K; NaN before any is counted."""
        self.skipped.warn()
        return functional.perplexity(self.count)

    def train(self, mode: bool = True) -> "FastChannelVQ":
        """Set the mode as `nn.Module.train` does; training mode drops the tree of `build_index`."""
        if mode:
            self._index = None
        self.skipped.warn()
        return super().train(mode)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"num_codes={self.num_codes}, code_dim={self.code_dim}, num_groups={self.num_groups}, "
            f"layout={self.token_layout.layout!r}, split={self.token_layout.split!r}, metric={self.metric!r}, "
            f"commitment={self.commitment}, estimator={self.estimator!r}, deterministic={self.deterministic}, "
            f"impl={self.impl!r}"
        )

    def _vectors(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``[B, T, d]`` as vectors ``[N, G, d]``, zeros where mask bool ``[N, G]`` is False."""
        vectors = self.token_layout.by_group(tokens)
        # padding may be NaN, which would spread
        return vectors if mask is None else vectors.masked_fill(~mask[..., None], 0)

    def _in_metric(self, vectors: Tensor) -> Tensor:
        """Vectors or codes as the results are about: normalized for ``metric="cosine"``."""
        return _normalized(vectors) if self.metric == "cosine" else vectors

    def _weight(self, weight: Tensor | None) -> Tensor | None:
        """A weight in the shape of x, as ``[N, G, d]``."""
        if weight is None:
            return None
        if self.metric != "diagonal":
            raise ValueError(f"weight: expected None for metric={self.metric!r}, got a tensor")
        return self.token_layout.by_group(self.token_layout.tokens(weight))

    def _replace_dead_codes(self, queries: Tensor, counted: Tensor | None, applies: Tensor | None) -> None:
        assert self.dead_codes is not None
        moved = self.dead_codes.replace_(self._whole_codebook(), queries, counted, self.processes, applies)
        self._restart_averages(moved)

    def _codes_of_call(self, queries: Tensor) -> Tensor:
        """`current_codes`, or, if the call runs again, those of its first run; with their gradient to the codebook."""
        codebook: Tensor = self._whole_codebook()
        if torch.compiler.is_compiling() or self._memory.needed():
            codes = self._memory.codes_of_call(queries.detach(), codebook.detach())
            codebook = estimate("straight_through", codebook, codes) if codebook.requires_grad else codes
        elif self.metric == "cosine" and self.dead_codes is not None:
            codebook = (
                codebook.clone()
            )  # autograd saves what is normalized, and the next call's replacements overwrite it
        return self._in_metric(codebook)

    def _search(
        self,
        queries: Tensor,
        codes: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        counted: Tensor | None,
        count: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The nearest codes ``[N, G, d]`` and indices ``[N, G]``; adds the selections of counted queries to ``count``."""
        if self.metric in ("l2", "cosine") and mask is None and self._index is None:  # one operator does it all
            quantized, indices = functional.quantize(
                queries, codes, count=count, impl=self.impl, deterministic=self.deterministic
            )
            if count is not None and counted is not None:
                with apart():
                    count.scatter_add_(1, indices.T, counted.T.long() - 1)
            return quantized, indices
        indices = self._nearest(queries, codes, weight)
        quantized = functional.look_up(codes, indices, queries.dtype, impl=self.impl, deterministic=self.deterministic)
        if count is not None:
            with apart():
                if counted is None:
                    functional.count_codes_(count, indices, impl=self.impl)
                else:
                    count.scatter_add_(1, indices.T, counted.T.long())
        return quantized, indices

    def _nearest(self, queries: Tensor, codes: Tensor, weight: Tensor | None) -> Tensor:
        """Indices int64 ``[N, G]`` of the queries among `current_codes`."""
        if self.metric == "cosine_lookup":
            queries = _normalized(queries.detach())
            codes = codes if self._index is not None else _normalized(codes.detach())
        if self._index is not None:
            return self._index.nearest_code(queries)
        metric = "l2" if self.metric in COSINES else self.metric
        return functional.nearest_code(queries, codes, metric=metric, weight=weight, impl=self.impl)

    @torch.no_grad()
    def _statistics(self, queries: Tensor, indices: Tensor, counted: Tensor | None, count: Tensor) -> CodeStatistics:
        """What this call's updates need."""
        if self.update is None:
            return CodeStatistics(count, None)
        values = queries if counted is None else queries.masked_fill(~counted[..., None], 0)
        return CodeStatistics(count, functional.segment_sum(values, indices, self.num_codes, impl=self.impl))

    @torch.no_grad()
    def _reduce_statistics(self, statistics: CodeStatistics) -> CodeStatistics:
        """The statistics of all processes."""
        return statistics.over(self.processes)

    @torch.no_grad()
    def _apply_statistics(self, statistics: CodeStatistics, applies: Tensor | None) -> None:
        """Count the selections, and let the averages move the codes, unless ``applies`` is False."""
        if applies is not None:
            statistics = CodeStatistics(statistics.count * applies, statistics.total)
        self.count.add_(statistics.count)
        if self.dead_codes is not None:
            self.dead_codes.apply_(statistics, applies)
        if self.update is not None:
            self.update.apply_(self._whole_codebook(), statistics, applies)


def _normalized(x: Tensor) -> Tensor:
    """x over its length in float32, as `torch.nn.functional.normalize`; rows are contiguous, whatever x's strides."""
    return F.normalize(x.float().contiguous(), dim=-1)
