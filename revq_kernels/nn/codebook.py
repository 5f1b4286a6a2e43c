"""The codes of a quantizer: which are nearest, how often each was chosen, and what moves them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels.automatic import AutomaticIndex
from revq_kernels.functional import Quantized, count_codes_, look_up, nearest_code, quantize
from revq_kernels.nn.dead_codes import ReplaceDeadCodes
from revq_kernels.nn.ema import EMAUpdate
from revq_kernels.nn.initialize import initial_codebook
from revq_kernels.nn.masks import count_masked_
from revq_kernels.reset import reset_codes_
from revq_kernels.validation import COSINES


class Codebook(nn.Module):
    """The half of `FastChannelVQ` that knows nothing of latents; its arguments and attributes are described there."""

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        num_groups: int,
        metric: str,
        deterministic: bool,
        update: EMAUpdate | None,
        codes: nn.Module | None,
        dead_codes: ReplaceDeadCodes | None,
    ) -> None:
        super().__init__()
        if codes is not None and (update is not None or dead_codes is not None):
            raise ValueError("codes: expected None beside update or dead_codes, which move a codebook, got a module")
        self.num_codes, self.code_dim, self.num_groups = num_codes, code_dim, num_groups
        self.metric, self.deterministic = metric, deterministic
        codebook = nn.Parameter(torch.randn(num_groups, num_codes, code_dim, dtype=torch.float32))
        self.register_parameter("codebook", codebook if codes is None else None)
        self.register_buffer("count", torch.zeros(num_groups, num_codes, dtype=torch.int64))
        self.update, self.codes, self.dead_codes = update, codes, dead_codes
        for companion in (update, dead_codes):
            if companion is not None:
                companion.bind(codebook)
        self.automatic = AutomaticIndex()

    def current_codes(self) -> Tensor:
        """``[G, K, d]``: what `decode` returns rows of: the codebook or ``codes``, normalized for ``metric="cosine"``."""
        codes = self.codebook
        if self.codes is not None:
            codes, shape = self.codes(), (*self.count.shape, self.code_dim)
            if tuple(codes.shape) != shape:
                raise ValueError(f"codes: expected a module that makes [G, K, d] = {shape}, got {tuple(codes.shape)}")
        if self.metric != "cosine":
            return codes
        # a graph that is still to be run backward must not see the next call's replacements
        return normalized(codes if self.dead_codes is None else codes.clone())

    def queries(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Vectors ``[N, G, d]`` as the metric sees them, zeros where mask bool ``[N, G]`` is False."""
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)  # a padding of NaN stops here
        return normalized(x) if self.metric == "cosine" else x

    def nearest(self, queries: Tensor, codes: Tensor, weight: Tensor | None = None) -> Tensor:
        """Indices int64 ``[N, G]`` of `queries` among `current_codes`."""
        if self.metric not in ("l2", *COSINES):
            return nearest_code(queries, codes, metric=self.metric, weight=weight)
        if weight is not None:
            raise ValueError(f"weight: expected None for metric={self.metric!r}, got a tensor")
        if self.metric == "cosine_lookup":
            queries, codes = normalized(queries.detach()), normalized(codes.detach())
        return nearest_code(queries, codes) if self.training else self.automatic.nearest_code(queries, codes)

    def choose(self, queries: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Quantized:
        """The codes of `queries` and their indices; in training mode all that follows from a choice happens here too.

        Codes that the policy calls dead are replaced first, choices are counted, and averages move the codes last: the
        result is of the codes as they were.
        """
        if self.training and self.dead_codes is not None:
            self._restart(self.dead_codes.step_(self.codebook, queries, mask))
        codes = self.current_codes()
        followed = self.update is not None or self.dead_codes is not None
        count = torch.zeros_like(self.count) if followed else self.count
        if self.metric in ("l2", "cosine") and mask is None and weight is None:  # one call does it all
            if not self.training:
                return self.automatic.quantize(queries, codes, deterministic=self.deterministic)
            quantized, indices = quantize(queries, codes, count=count, deterministic=self.deterministic)
        else:
            indices = self.nearest(queries, codes, weight)
            quantized = look_up(codes, indices, queries.dtype, deterministic=self.deterministic)
            if self.training and mask is None:
                count_codes_(count, indices)
            elif self.training:
                count_masked_(count, indices, mask)
        if self.training and followed:
            self.count += count
            if self.dead_codes is not None:
                self.dead_codes.count_(count)
            if self.update is not None:
                self.update.step_(self.codebook, queries.detach(), indices, count)
        return Quantized(quantized, indices)

    @torch.no_grad()
    def start_(self, queries: Tensor, mask: Tensor | None, iterations: int, generator: torch.Generator | None) -> None:
        """Set the codes to `initial_codebook` of `queries`."""
        self._require_codebook()
        self.codebook.copy_(initial_codebook(queries, mask, self.num_codes, iterations, generator))
        self._restart(torch.ones_like(self.count, dtype=torch.bool))
        self._count_anew()

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
            bool ``[G, K]``: the moved rows, whose optimizer state the caller should clear.
        """
        self._require_codebook()
        moved = reset_codes_(
            self.codebook, self.count, noise=noise, max_fraction=max_fraction, pairing=pairing, generator=generator
        )
        self._restart(moved)
        self._count_anew()
        return moved

    def train(self, mode: bool = True) -> "Codebook":
        """As any module's; training mode frees the search tree that evaluation may have built."""
        if mode:
            self.automatic.forget()
        return super().train(mode)

    @property
    def utilization(self) -> Tensor:
        """float32 ``[G]``: share of each codebook's codes that were counted at least once."""
        return (self.count > 0).float().mean(dim=1)

    @property
    def perplexity(self) -> Tensor:
        """float32 ``[G]``: exp of the entropy of the counted choices, between 1 and K; NaN before anything is counted."""
        share = self.count.double() / self.count.sum(dim=1, keepdim=True)
        return torch.special.entr(share).sum(dim=1).exp().float()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As any module's; codes that come without averages become the averages, which else would overwrite them."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "codebook" in state_dict and prefix + "update.embed_sum" not in state_dict:
            self._restart(torch.ones_like(self.count, dtype=torch.bool))

    def _count_anew(self) -> None:
        self.count.zero_()
        if self.dead_codes is not None:
            self.dead_codes.restart_()

    def _restart(self, moved: Tensor) -> None:
        if self.update is not None:
            self.update.restart_(self.codebook, moved)

    def _require_codebook(self) -> None:
        if self.codebook is None:
            raise ValueError("codes: expected None for a codebook to move, got a module that makes the codes")


def normalized(x: Tensor) -> Tensor:
    """x over its length in float32, as `torch.nn.functional.normalize`; rows are contiguous, whatever x's strides."""
    return F.normalize(x.float().contiguous(), dim=-1)
