"""The methods that take the place of those of vector-quantize-pytorch's Codebook."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revq_kernels.interop.families.lucidrains_distances import similarities
from revq_kernels.interop.families.lucidrains_search import assign, kmeans, rows_of, segment_sum


class CodebookMethods:
    """The codebook's search, k-means and EMA; ``embed_onehot`` may be the indices ``[h, n]`` themselves."""

    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """k-means by the fused search, with the same draws."""
        import vector_quantize_pytorch.vector_quantize_pytorch as package

        if self.initted:
            return
        data = data.detach()
        if mask is not None:
            data = data[mask].view(data.shape[0], -1, data.shape[-1])
        if data.shape[-2] < self.codebook_size:
            package.logger.warning(
                f"k-means init received {data.shape[-2]} vectors for a codebook of {self.codebook_size}"
                " - duplicates will be sampled"
            )
        means, bins = kmeans(self, data)
        self.embed_avg.data.copy_(means * bins.unsqueeze(-1))
        self.cluster_size.data.copy_(bins)
        self.update_ema()
        self.initted.data.copy_(torch.tensor(True))

    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
    ) -> None:
        """Counts and segment sums in the place of products with one-hots."""
        import vector_quantize_pytorch.vector_quantize_pytorch as package

        if embed_onehot.is_floating_point():
            return super().track_cluster_size_and_embed_avg(
                flatten, embed_onehot, mask, ema_update_weight, accum_ema_update
            )
        indices = embed_onehot
        if self.affine_param:
            codebook_std = self.codebook_variance.clamp(min=1e-5).sqrt()
            batch_std = self.batch_variance.clamp(min=1e-5).sqrt()
            flatten = (flatten - self.batch_mean) * (codebook_std / batch_std) + self.codebook_mean
        chosen = flatten.new_ones(indices.shape)
        if mask is not None:
            chosen = mask.to(flatten.dtype)
            flatten = flatten.masked_fill(~mask.unsqueeze(-1), 0.0)
        cluster_size = flatten.new_zeros(len(indices), self.codebook_size).scatter_add_(1, indices, chosen)
        self.all_reduce_fn(cluster_size)
        embed_sum = segment_sum(flatten, indices, self.codebook_size)
        self.all_reduce_fn(embed_sum)
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(embed_sum, cluster_size)
        if accum_ema_update:
            package.accum_grad_(self.cluster_size, cluster_size)
            package.accum_grad_(self.embed_avg, embed_sum)
        else:
            package.ema_inplace(self.cluster_size, cluster_size, self.decay, ema_update_weight)
            package.ema_inplace(self.embed_avg, embed_sum, self.decay, ema_update_weight)

    def update_indices(
        self,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """As the original, without the one-hots."""
        x = x.float()
        if x.ndim < 4:
            x, embed_ind = x.unsqueeze(0), embed_ind.unsqueeze(0)
        flatten = x.reshape(x.shape[0], -1, x.shape[-1])
        mask = None if mask is None else _per_row(mask, flatten)
        indices = embed_ind.reshape(len(embed_ind), -1)
        indices = indices.masked_fill(indices == -1, 0)
        self.update_codebook(
            flatten,
            indices,
            mask=mask,
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )

    update_ema_indices = update_indices

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The original's where it draws, ranks or transforms codes, which takes all distances; else `_look_up`."""
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        if codebook_transform_fn is not None or topk is not None or (self.training and samples(self, temperature)):
            return super().forward(
                x,
                sample_codebook_temp,
                mask,
                freeze_codebook,
                codebook_transform_fn,
                ema_update_weight,
                accum_ema_update,
                ema_update,
                topk,
                update_usage,
            )
        updates = self.training and update_usage and not freeze_codebook
        ema_update = self.ema_update if ema_update is None else ema_update
        options = {
            "ema_update_weight": ema_update_weight,
            "accum_ema_update": accum_ema_update,
            "ema_update": ema_update,
        }
        return (_outside_graphs or [_look_up])[0](self, x, mask, options if updates else None)


def outside_graphs() -> None:
    """Let torch.compile run the look-up as it stands: one break of the graph for what depends on data, not several.

    Not done at import, as it loads the compiler; the package itself has loaded it.
    """
    if not _outside_graphs:
        _outside_graphs.append(torch.compiler.disable(_look_up))


def samples(module: nn.Module, temperature: float) -> bool:
    """Whether a training step draws codes, or mixes them, which needs every distance."""
    chosen = options(module)
    return temperature > 0 and bool(chosen.get("stochastic") or chosen.get("straight_through"))


def options(module: nn.Module) -> dict[str, Any]:
    """The options of the function that chooses the codes."""
    return module.gumbel_sample.keywords if isinstance(module.gumbel_sample, partial) else {}


_outside_graphs: list[Callable] = []


def _look_up(
    self: nn.Module, x: Tensor, mask: Tensor | None, update: dict[str, Any] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, indices and distances; ``update`` are the options of the update that follows."""
    with torch.autocast("cuda", enabled=False):
        x = x.float()
        single = x.ndim < 4
        if single:
            x = x.unsqueeze(0)
        flatten = x.reshape(x.shape[0], -1, x.shape[-1])
        mask = None if mask is None else _per_row(mask, flatten)
        self.init_embed_(flatten, mask=mask)
        if self.affine_param:
            self.update_affine(flatten, self.embed, mask=mask)
        embed = self.embed if self.learnable_codebook else self.embed.detach()
        embed = embed.to(x.dtype)
        if self.vq_bridge is not None:
            embed = self.vq_bridge(embed)
        if self.affine_param:
            codebook_std = self.codebook_variance.clamp(min=1e-5).sqrt()
            batch_std = self.batch_variance.clamp(min=1e-5).sqrt()
            embed = (embed - self.codebook_mean) * (batch_std / codebook_std) + self.batch_mean
        indices = assign(flatten, embed, self.use_cosine_sim)
        quantize = rows_of(embed, indices).view(x.shape)
        distances = similarities(flatten, embed, x.shape[1:-1], self.use_cosine_sim, updated=update is not None)
        if update is not None:
            self.update_codebook(flatten, indices, mask=mask, **update)
        indices = indices.view(x.shape[:-1])
        if single:
            quantize, indices = quantize.squeeze(0), indices.squeeze(0)
        return quantize, indices, distances


def _per_row(mask: Tensor, flatten: Tensor) -> Tensor:
    """``mask`` ``[b, n]`` for every row of ``flatten`` ``[c, b * h * n, d]``."""
    heads = flatten.shape[1] // mask.numel()
    return mask.unsqueeze(1).expand(-1, heads, -1).reshape(1, -1).expand(len(flatten), -1)
