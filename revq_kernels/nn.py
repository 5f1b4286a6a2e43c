"""`FastChannelVQ`: the operations as a quantizer module."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels.autograd import StraightThrough
from revq_kernels.automatic import AutomaticIndex
from revq_kernels.functional import nearest_code, quantize
from revq_kernels.layout import Split, check_split, merge_tokens, split_tokens
from revq_kernels.reset import reset_codes_
from revq_kernels.validation import check_index_range, check_indices


class QuantizerOutput(NamedTuple):
    """What `FastChannelVQ` returns: the input's latents quantised, their indices, and a loss to minimise."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class FastChannelVQ(nn.Module):
    """Vector quantisation by exact nearest-code search, without a distance matrix.

    Takes latents ``[B, C, H, W]``, which it cuts into tokens, or tokens ``[B, T, d]``.  Token t uses codebook t mod G
    (as the released ReVQ code; with one codebook per token, G = T, it is simply codebook t).  T comes from the input.

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
        split: how ``[B, C, H, W]`` is cut, "channel" (paper, section 3.2.1) or "space" (see `split_tokens`).
        straight_through: pass the gradient of ``quantized`` to x unchanged.  False, as in ReVQ: pass it to the codebook.
        commitment: weight of the loss that draws x to its code; 0 switches it off.
        deterministic: whether the codebook's gradient has the same bits in every run, as for `quantize`.

    Attributes:
        codebook: parameter float32 ``[G, K, d]``, standard normal until `initialise_` or training changes it.
        count: buffer int64 ``[G, K]``: choices of each code in training mode since the last `reset_`.

    Raises:
        ValueError: for sizes below 1, an unknown split or a negative commitment.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        num_groups: int = 1,
        split: Split = "channel",
        straight_through: bool = True,
        commitment: float = 0.25,
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (("num_codes", num_codes), ("code_dim", code_dim), ("num_groups", num_groups)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
        if not commitment >= 0:
            raise ValueError(f"commitment: expected a weight >= 0, got {commitment}")
        check_split(split)
        self.num_codes, self.code_dim, self.num_groups = num_codes, code_dim, num_groups
        self.split, self.straight_through, self.commitment = split, straight_through, commitment
        self.deterministic = deterministic
        self.codebook = nn.Parameter(torch.randn(num_groups, num_codes, code_dim, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(num_groups, num_codes, dtype=torch.int64))
        self.automatic = AutomaticIndex()

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantise ``x`` ``[B, C, H, W]`` or ``[B, T, d]``; in training mode also count.

        Returns:
            ``quantized`` in x's shape and dtype, ``indices`` int64 ``[B, T]``, ``loss`` a float32 scalar (0 for an
            empty batch).

        Raises:
            ValueError: if x has another rank, d does not fit, or T is not a multiple of ``num_groups``.
        """
        tokens = self._tokens(x)
        queries = self._grouped(tokens)
        if self.training:
            result = quantize(queries, self.codebook, count=self.count, deterministic=self.deterministic)
        else:
            result = self.automatic.quantize(queries, self.codebook, deterministic=self.deterministic)
        quantized, indices = result
        quantized = quantized.reshape(tokens.shape)
        loss = self._loss(tokens, quantized)
        if self.straight_through:
            quantized = StraightThrough.apply(tokens, quantized.detach())
        return QuantizerOutput(self._like_input(quantized, x), indices.reshape(tokens.shape[:2]), loss)

    def encode(self, x: Tensor) -> Tensor:
        """The indices of ``x`` ``[B, C, H, W]`` or ``[B, T, d]``: int64 ``[B, T]``; counts nothing."""
        tokens = self._tokens(x)
        search = nearest_code if self.training else self.automatic.nearest_code
        return search(self._grouped(tokens), self.codebook).reshape(tokens.shape[:2])

    def train(self, mode: bool = True) -> "FastChannelVQ":
        """As any module's; training mode frees the search tree that evaluation may have built."""
        if mode:
            self.automatic.forget()
        return super().train(mode)

    def decode(self, indices: Tensor, latent_shape: tuple[int, int, int] | None = None) -> Tensor:
        """The codes of ``indices`` int64 ``[B, T]``: ``[B, T, d]``, or ``[B, C, h, w]`` when a latent shape is given.

        Raises:
            ValueError: if T is not a multiple of ``num_groups``, an index is not in [0, K), or the shape does not fit.
            TypeError: for another dtype.
        """
        check_indices(indices)
        if indices.dim() != 2 or indices.shape[1] % self.num_groups:
            raise ValueError(
                f"indices: expected [B, T] with T a multiple of num_groups={self.num_groups}, got {tuple(indices.shape)}"
            )
        check_index_range(indices, self.num_codes)
        group = torch.arange(indices.shape[1], device=indices.device) % self.num_groups
        tokens = self.codebook[group, indices]
        return tokens if latent_shape is None else merge_tokens(tokens, latent_shape, self.split)

    @torch.no_grad()
    def initialise_(self, x: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Set each codebook to K vectors of ``x`` (as for `forward`), drawn without replacement.

        Drawing with replacement would start with 2 to 27 % exact twins at the paper's sizes, of which only the lower
        index is ever chosen.

        Raises:
            ValueError: if a group has fewer than K vectors.
        """
        vectors = self._grouped(self._tokens(x))  # [N, G, d]
        if vectors.shape[0] < self.num_codes:
            raise ValueError(
                f"x: expected at least num_codes={self.num_codes} vectors per group to draw from, got {vectors.shape[0]}"
            )
        device = "cpu" if generator is None else generator.device
        for group in range(self.num_groups):
            chosen = torch.randperm(vectors.shape[0], generator=generator, device=device)[: self.num_codes]
            self.codebook[group] = vectors[chosen.to(vectors.device), group].to(self.codebook.dtype)

    def reset_(
        self,
        *,
        noise: float = 0.1,
        max_fraction: float = 1.0,
        pairing: str = "paper",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Move the codes that nothing chose since the last call (see `reset_codes_`), then start counting anew.

        Returns:
            bool ``[G, K]``: the moved rows, whose optimiser state the caller should clear.
        """
        moved = reset_codes_(
            self.codebook, self.count, noise=noise, max_fraction=max_fraction, pairing=pairing, generator=generator
        )
        self.count.zero_()
        return moved

    @property
    def utilisation(self) -> Tensor:
        """float32 ``[G]``: share of each codebook's codes that were counted at least once."""
        return (self.count > 0).float().mean(dim=1)

    @property
    def perplexity(self) -> Tensor:
        """float32 ``[G]``: exp of the entropy of the counted choices, between 1 and K; NaN before anything is counted."""
        share = self.count.double() / self.count.sum(dim=1, keepdim=True)
        return torch.special.entr(share).sum(dim=1).exp().float()

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"num_codes={self.num_codes}, code_dim={self.code_dim}, num_groups={self.num_groups}, "
            f"split={self.split!r}, straight_through={self.straight_through}, commitment={self.commitment}, "
            f"deterministic={self.deterministic}"
        )

    def _tokens(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` or ``[B, T, d]`` -> ``[B, T, d]``, with T a multiple of G."""
        if x.dim() == 4:
            x = split_tokens(x, self.code_dim, self.split)
        elif x.dim() != 3 or x.shape[2] != self.code_dim:
            raise ValueError(f"x: expected [B, C, H, W] or [B, T, d={self.code_dim}], got shape {tuple(x.shape)}")
        if x.shape[1] % self.num_groups:
            raise ValueError(
                f"x: expected T to be a multiple of num_groups={self.num_groups}, got T={x.shape[1]} tokens"
            )
        return x

    def _grouped(self, tokens: Tensor) -> Tensor:
        """``[B, T, d]`` -> ``[B*T/G, G, d]``: token t goes to group t mod G."""
        batch, num_tokens, _ = tokens.shape
        return tokens.reshape(batch * num_tokens // self.num_groups, self.num_groups, self.code_dim)

    def _like_input(self, tokens: Tensor, x: Tensor) -> Tensor:
        return merge_tokens(tokens, tuple(x.shape[1:]), self.split) if x.dim() == 4 else tokens

    def _loss(self, tokens: Tensor, quantized: Tensor) -> Tensor:
        if tokens.numel() == 0:
            return quantized.float().sum()
        loss = F.mse_loss(quantized.float(), tokens.detach().float())
        if self.commitment:
            loss = loss + self.commitment * F.mse_loss(tokens.float(), quantized.detach().float())
        return loss
