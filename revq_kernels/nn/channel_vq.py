"""`FastChannelVQ`: the operations as a quantizer module."""

from typing import Any

import torch
from torch import Tensor, nn

from revq_kernels.nn.arrange import Arrangement
from revq_kernels.nn.codebook import Codebook
from revq_kernels.nn.dead_codes import ReplaceDeadCodes
from revq_kernels.nn.ema import EMAUpdate
from revq_kernels.nn.estimators import Estimator, check_estimator, estimate
from revq_kernels.nn.layout import Layout, Split
from revq_kernels.nn.losses import check_commitment, loss_weights, vq_losses
from revq_kernels.nn.output import Parts, Returns, format_of
from revq_kernels.validation import check_index_range, check_indices, check_quantizer


class FastChannelVQ(Codebook):
    """Vector quantization by exact nearest-code search, without a distance matrix.

    Takes latents, which it cuts into tokens, or tokens ``[B, T, d]``.  Token t uses codebook t mod G (as the released
    ReVQ code; with one codebook per token, G = T, it is simply codebook t).  T comes from the input.

    ``loss = mse(x.detach(), quantized) + commitment * mse(x, quantized.detach())``, in float32.

    In eval mode on the CPU, a large codebook that is searched often is searched through a `CodebookIndex` where that has
    shown itself the faster way; the results are the same, bit for bit, whatever happens to the codebook in between
    (``automatic`` says what runs and why).

    Several processes: each counts its own choices, and `reset_` decides by them alone.  Under DistributedDataParallel
    pass ``broadcast_buffers=False``, add the counts up over the processes before `reset_`, and give it generators of
    one seed; nothing here does that yet.

    Args:
        num_codes: K, codes per codebook.
        code_dim: d, numbers per code.
        num_groups: G, codebooks.
        layout: of the latents, "BCHW", "BLC", "BDT", "BTCHW" or "BCDHW".  None: four dimensions are BCHW, three are
            tokens ``[B, T, d]`` that nothing cuts any more.
        split: how latents are cut: "channel" (paper, section 3.2.1), "last" (a position's channels; with d = C the
            usual VQ layer; also "space") or "flat" (see `split_tokens`).
        metric: "l2"; "cosine" (tokens and codes are normalized, and all results are about the normalized ones);
            "cosine_lookup" (normalized for the search alone); "inner_product" (the largest); or "diagonal" (with a
            ``weight`` per call).  The last two run on the reference (`explain`).
        commitment: weight of the loss that draws x to its code; 0 switches it off.
        legacy_beta: put that weight on the other term, as VQGAN's code does (see `loss_weights`).
        loss_in_eval: False makes the loss 0 in eval mode.
        estimator: "straight_through" passes the gradient of ``quantized`` to x unchanged, "rotation" turns and scales
            it (see `Rotation`), "none", as in ReVQ, passes it to the codebook.
        deterministic: whether the codebook's gradient has the same bits in every run, as for `quantize`.
        update: `EMAUpdate`: averages move the codes, no gradient.
        codes: a module that makes the codes ``[G, K, d]`` in place of a codebook, such as `MappedCodes`.
        dead_codes: `ReplaceDeadCodes`: little used codes start anew during training.
        returns: "own" (`QuantizerOutput`) or a name of ``returns.FORMATS``, or a function as there.

    Attributes:
        codebook: parameter float32 ``[G, K, d]``, standard normal until `initialize_` or training changes it; None with
            ``codes``.
        count: buffer int64 ``[G, K]``: choices of each code in training mode since the last `reset_`.

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
        returns: str | Returns = "own",
    ) -> None:
        check_commitment(commitment)  # all checks come before the companions are bound
        check_estimator(estimator)
        check_quantizer(num_codes, code_dim, num_groups, metric)
        arrangement, returned = Arrangement(code_dim, num_groups, layout, split), format_of(returns)
        super().__init__(num_codes, code_dim, num_groups, metric, deterministic, update, codes, dead_codes)
        self.arrangement = arrangement
        self.commitment, self.legacy_beta, self.loss_in_eval = commitment, legacy_beta, loss_in_eval
        self.estimator, self.returns = estimator, returned

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
            empty batch), unless ``returns`` says otherwise.

        Raises:
            ValueError: if x has another rank, d does not fit, T is not a multiple of ``num_groups``, or a mask, lengths or
                a weight do not fit x.
        """
        return self.returns(self.parts(x, mask=mask, lengths=lengths, weight=weight), self)

    def parts(
        self, x: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None, weight: Tensor | None = None
    ) -> Parts:
        """As `forward`, before the return format."""
        tokens, queries, mask, rows = self._cut(x, mask, lengths)
        quantized, indices = self.choose(queries, rows, self._weight(weight))
        inputs, quantized = queries.reshape(tokens.shape), quantized.reshape(tokens.shape)
        indices = indices.reshape(tokens.shape[:2])
        weights = loss_weights(self.commitment, self.legacy_beta, learned_codes=self.update is None)
        losses = (torch.zeros((), device=x.device, dtype=torch.float32),) * 3
        if self.training or self.loss_in_eval:
            losses = vq_losses(inputs, quantized, mask, weights)
        quantized = estimate(self.estimator, inputs, quantized).to(x.dtype)
        if mask is not None:
            quantized = torch.where(mask[..., None], quantized, tokens)
            indices = indices.masked_fill(~mask, -1)
        by_position = self.arrangement.by_position(indices, x)
        return Parts(self.arrangement.like(quantized, x), indices, *losses, weights, x, by_position)

    def encode(self, x: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """The indices of latents or tokens ``x``: int64 ``[B, T]``; counts nothing."""
        tokens, queries, _, _ = self._cut(x)
        return self.nearest(queries, self.current_codes(), self._weight(weight)).reshape(tokens.shape[:2])

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
        return tokens if latent_shape is None else self.arrangement.latents(tokens, latent_shape)

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

        Raises:
            ValueError: if a group has fewer than K vectors that count, or ``codes`` makes the codes.
        """
        _, queries, _, rows = self._cut(x, mask, lengths)
        self.start_(queries, rows, iterations, generator)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"num_codes={self.num_codes}, code_dim={self.code_dim}, num_groups={self.num_groups}, "
            f"layout={self.arrangement.layout!r}, split={self.arrangement.split!r}, metric={self.metric!r}, "
            f"commitment={self.commitment}, estimator={self.estimator!r}, deterministic={self.deterministic}"
        )

    def _cut(
        self, x: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x as tokens ``[B, T, d]`` and as queries ``[N, G, d]``; the mask as ``[B, T]`` and as ``[N, G]``."""
        tokens, mask = self.arrangement.tokens(x), self.arrangement.mask(x, mask, lengths)
        rows = None if mask is None else self.arrangement.grouped(mask)
        return tokens, self.queries(self.arrangement.grouped(tokens), rows), mask, rows

    def _weight(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else self.arrangement.grouped(self.arrangement.tokens(weight))
