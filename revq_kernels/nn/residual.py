"""`ResidualVQ`: quantizers in stages, each quantizes the residual of the stages before it."""

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from revq_kernels.nn.channel_vq import FastChannelVQ
from revq_kernels.nn.layout import token_mask
from revq_kernels.nn.losses import estimate
from revq_kernels.nn.output import QuantizerOutput
from revq_kernels.nn.projected import ProjectedVQ


class ResidualVQ(nn.Module):
    """Residual vector quantization (Zeghidour et al. 2021): ``quantized`` is the sum of all stages' codes.

    The input of a stage is x minus the codes of the earlier stages, which are constants there: so each stage's commitment
    loss reaches x, which it does not if a straight-through code is subtracted (encodec #25).  x gets the gradient of
    the sum once, by the first stage's estimator, and not once per stage; stages that project (`ProjectedVQ`) pass their
    own gradient on, because their maps learn from it.

    With quantizer dropout (training mode), that share of the samples uses the first n stages only, n uniform in 1 ... Q;
    in the other stages they have index -1 and are not counted.

    Grouped residual quantization, a part of the channels per group, is this class with ``num_groups=G, split="space"``
    and ``code_dim = C / G`` in each stage.

    Args:
        stages: Q quantizers of one input shape, `FastChannelVQ` or `ProjectedVQ`.
        quantizer_dropout: share of the samples, 0 for none.

    Raises:
        ValueError: for no stages, stages of both kinds, or a share out of range.
    """

    def __init__(self, stages: Sequence[nn.Module], *, quantizer_dropout: float = 0.0) -> None:
        super().__init__()
        alike = any(all(isinstance(stage, kind) for stage in stages) for kind in (FastChannelVQ, ProjectedVQ))
        if not stages or not alike:
            raise ValueError(
                "stages: expected one or more, all FastChannelVQ or all ProjectedVQ, got "
                f"[{', '.join(type(stage).__name__ for stage in stages)}]"
            )
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(f"quantizer_dropout: expected a share between 0 and 1, got {quantizer_dropout}")
        self.stages, self.quantizer_dropout = nn.ModuleList(stages), quantizer_dropout

    def forward(self, x: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None) -> QuantizerOutput:
        """``quantized`` like x, ``indices`` int64 ``[B, T, Q]`` (-1 where masked or dropped), ``loss`` summed over stages.

        ``mask`` and ``lengths`` are those of `FastChannelVQ.forward`; a masked position keeps its value.
        """
        stages = self._typed_stages()
        first = stages[0]
        mask = self._position_mask(x, mask, lengths)
        used = self._stages_used(x)
        # float32, as codes are; a projection takes the dtype of its weights
        residual = x.float() if isinstance(first, FastChannelVQ) else x
        total: Tensor | None = None
        indices, loss = [], torch.zeros((), dtype=torch.float32, device=x.device)
        for number, stage in enumerate(stages):
            kept = None if used is None else used > number  # [B]
            stage_mask = mask if kept is None else kept[:, None] if mask is None else mask & kept[:, None]
            details = stage.quantize(residual, mask=stage_mask)
            quantized = details.quantized
            if kept is not None:
                quantized = torch.where(kept.reshape(-1, *[1] * (x.dim() - 1)), quantized, 0)
            total = quantized if total is None else total + quantized
            residual = residual - quantized.detach()
            indices.append(details.indices)
            loss = loss + details.loss
        assert total is not None  # there is at least one stage
        if isinstance(first, FastChannelVQ):
            layout = first.token_layout
            estimated = estimate(first.estimator, layout.tokens(x.float()), layout.tokens(total))
            total = layout.restore(estimated, x).to(x.dtype)
        return QuantizerOutput(total, torch.stack(indices, dim=-1), loss)

    def encode(self, x: Tensor) -> Tensor:
        """The indices int64 ``[B, T, Q]`` of ``x``; counts nothing."""
        return self._encode_stages(x)

    def decode(self, indices: Tensor, latent_shape: tuple[int, ...] | None = None) -> Tensor:
        """The sum of the codes of ``indices`` int64 ``[B, T, q]``, of the first q <= Q stages; -1 adds nothing.

        Raises:
            ValueError: for another q, or as `FastChannelVQ.decode`.
        """
        if indices.dim() != 3 or not 1 <= indices.shape[2] <= len(self.stages):
            raise ValueError(
                f"indices: expected [B, T, q] with 1 <= q <= {len(self.stages)} stages, got {tuple(indices.shape)}"
            )
        by_stage = zip(self._typed_stages(), indices.unbind(dim=2), strict=False)
        first, *others = (stage.decode(of_stage, latent_shape) for stage, of_stage in by_stage)
        return sum(others, first)

    def initialize_(self, x: Tensor, **options: Any) -> None:
        """Each stage's ``initialize_`` with the same options, on the residual of the stages before it."""
        self._encode_stages(x, options)

    @torch.no_grad()
    def _encode_stages(self, x: Tensor, initialize: dict[str, Any] | None = None) -> Tensor:
        """The indices ``[B, T, Q]``; with options, each stage is initialized before it encodes."""
        stages = self._typed_stages()
        first = stages[0]
        shape = None if first.token_layout.layout_of(x) is None else tuple(x.shape[1:])
        residual, indices = x.float() if isinstance(first, FastChannelVQ) else x, []
        for stage in stages:
            if initialize is not None:
                stage.initialize_(residual, **initialize)
            indices.append(stage.encode(residual))
            residual = residual - stage.decode(indices[-1], shape)
        return torch.stack(indices, dim=-1)

    def _typed_stages(self) -> list[FastChannelVQ | ProjectedVQ]:
        """The stages with the type that the constructor checked; a `ModuleList` holds any modules."""
        return cast(list[FastChannelVQ | ProjectedVQ], list(self.stages))

    def _position_mask(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """bool ``[B, L]`` or ``[B, 1]``, as each stage takes it."""
        sizes = self._typed_stages()[0].token_layout.positions(x)  # a projection changes channels only
        positions = None if sizes is None else prod(sizes)
        return token_mask(mask, lengths, batch=x.shape[0], positions=positions, num_tokens=positions or 1)

    def _stages_used(self, x: Tensor) -> Tensor | None:
        """int64 ``[B]``: how many stages each sample uses; None for all."""
        if not (self.training and self.quantizer_dropout):
            return None
        batch, stages = x.shape[0], len(self.stages)
        fewer = torch.randint(1, stages + 1, (batch,), device=x.device)
        return torch.where(torch.rand(batch, device=x.device) < self.quantizer_dropout, fewer, stages)
