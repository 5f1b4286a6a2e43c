"""vector-quantize-pytorch 1.32: the Codebook inside VectorQuantize, ResidualVQ and others, and SimVQ."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from revq_kernels.interop.families.family import Call, Family, Quantizer, Vectors, source_of
from revq_kernels.interop.families.lucidrains_search import assign, rows_of, similarities
from revq_kernels.interop.search import code_sums, in_matmul_dtype, kmeans, kmeans_mismatch, nearest, with_kmeans

_MIN_VARIANCE = 1e-5
"""The package's lower limit on variances in affine reparameterization."""


class _Codebook:
    """Codebook: search, k-means and moving averages.  ``embed_onehot`` can be the indices ``[h, n]`` instead of one-hots."""

    def init_embed_(self: Quantizer, data: Tensor, mask: Tensor | None = None) -> None:
        if not self.initted:
            with_kmeans(self.revq_original.init_embed_, _kmeans)(self, data, mask)

    def track_cluster_size_and_embed_avg(
        self: Quantizer,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
    ) -> None:
        """Counts and sums by index replace the products with one-hots."""
        if embed_onehot.is_floating_point():
            return self.revq_original.track_cluster_size_and_embed_avg(
                self, flatten, embed_onehot, mask, ema_update_weight, accum_ema_update
            )
        indices, num_codes = embed_onehot, self.codebook_size
        if self.affine_param:
            flatten = _renormalized(flatten, _moments(self, "batch"), _moments(self, "codebook"))
        selected = flatten.new_ones(indices.shape)
        if mask is not None:
            selected = mask.to(flatten.dtype)
            flatten = flatten.masked_fill(~mask.unsqueeze(-1), 0.0)
        count = flatten.new_zeros(len(indices), num_codes).scatter_add_(1, indices, selected)
        total = code_sums(flatten, indices, num_codes)
        for statistic in (count, total):
            self.all_reduce_fn(statistic)
        weight = ema_update_weight(total, count) if callable(ema_update_weight) else ema_update_weight
        package = source_of(self)
        for average, statistic in ((self.cluster_size, count), (self.embed_avg, total)):
            if accum_ema_update:
                package.accum_grad_(average, statistic)
            else:
                package.ema_inplace(average, statistic, self.decay, weight)

    def update_indices(
        self: Quantizer,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Do what the original method does, without one-hot matrices."""
        rows, mask = _as_rows(x.float(), mask)
        indices = embed_ind.reshape(rows.shape[:-1])
        update = {
            "ema_update_weight": ema_update_weight,
            "accum_ema_update": accum_ema_update,
            "ema_update": ema_update,
        }
        self.update_codebook(rows, indices.masked_fill(indices == -1, 0), mask=mask, **update)

    update_ema_indices = update_indices

    def forward(
        self: Quantizer,
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
        """`_look_up`; the original's forward if it samples, ranks or transforms codes, which needs all distances."""
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        if codebook_transform_fn is not None or topk is not None or (self.training and _samples(self, temperature)):
            return self.revq_original.forward(
                self,
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
        update = None
        if self.training and update_usage and not freeze_codebook:
            update = {
                "ema_update_weight": ema_update_weight,
                "accum_ema_update": accum_ema_update,
                "ema_update": self.ema_update if ema_update is None else ema_update,
            }
        return _untraced_look_up(self, x, mask, update)


def _look_up(
    self: Quantizer, x: Tensor, mask: Tensor | None, update: dict[str, Any] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, indices and the lazy matrix of similarities; ``update``: arguments of `update_codebook`, None for no update."""
    with torch.autocast("cuda", enabled=False):
        x = x.float()
        rows, mask = _as_rows(x, mask)
        self.init_embed_(rows, mask=mask)
        if self.affine_param:
            self.update_affine(rows, self.embed, mask=mask)
        codes = (self.embed if self.learnable_codebook else self.embed.detach()).to(x.dtype)
        if self.vq_bridge is not None:
            codes = self.vq_bridge(codes)
        if self.affine_param:
            codes = _renormalized(codes, _moments(self, "codebook"), _moments(self, "batch"))
        indices = assign(rows, codes, self.use_cosine_sim)
        quantized = rows_of(codes, indices)
        cdist = None if self.use_cosine_sim else source_of(self).cdist
        positions = x.shape[1:-1] if x.ndim > 3 else x.shape[:-1]
        distances = similarities(rows, codes, positions, cdist, updated=update is not None)
        if update is not None:
            self.update_codebook(rows, indices, mask=mask, **update)
        return quantized.view(x.shape), indices.view(x.shape[:-1]), distances


_untraced_look_up: Callable = _look_up
"""`_look_up`; after `_keep_from_tracing` one that Dynamo does not trace."""


def _keep_from_tracing() -> None:
    """Make torch.compile run the look-up without tracing it: one graph break in place of one per data-dependent step.

    Not done on import, because torch.compiler.disable loads Dynamo, which takes seconds.  vector-quantize-pytorch loads it
    too, so a patch of its codebooks loses no time.
    """
    global _untraced_look_up
    if _untraced_look_up is _look_up:
        _untraced_look_up = torch.compiler.disable(_look_up)


def _as_rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x`` ``[b, n, d]`` or ``[h, ..., d]`` as ``[1, b * n, d]`` or ``[h, m, d]``; the mask ``[b, n]`` for each of its rows."""
    rows = x.reshape(x.shape[0] if x.ndim > 3 else 1, -1, x.shape[-1])
    if mask is not None:
        repeats = rows.shape[1] // mask.numel()  # heads of one codebook are rows of it
        mask = mask.unsqueeze(1).expand(-1, repeats, -1).reshape(1, -1).expand(len(rows), -1)
    return rows, mask


def _moments(codebook: Quantizer, of: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[h, 1, d]`` that a codebook tracks of its codes or of its batches."""
    mean, variance = getattr(codebook, f"{of}_mean"), getattr(codebook, f"{of}_variance")
    return mean, variance.clamp(min=_MIN_VARIANCE).sqrt()


def _renormalized(rows: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """Rows with mean and standard deviation ``old``, mapped to mean and standard deviation ``new``."""
    return (rows - old[0]) * (new[1] / old[1]) + new[0]


def _kmeans(
    samples: Tensor,
    num_clusters: int,
    num_iters: int,
    use_cosine_sim: bool,
    sample_fn: Callable[[Tensor, int], Tensor],
    all_reduce_fn: Callable[[Tensor], object],
) -> tuple[Tensor, Tensor]:
    """The package's function ``kmeans``: means ``[h, K, d]`` and their counts ``[h, K]`` of samples ``[h, n, d]``."""
    samples = samples.detach()
    means = sample_fn(samples, num_clusters)
    search = partial(assign, cosine=use_cosine_sim)
    normalize = partial(F.normalize, dim=-1, eps=1e-6) if use_cosine_sim else lambda means: means
    return kmeans(samples, means, num_iters, search, all_reduce_fn, normalize)


def _selection_options(codebook: Quantizer) -> dict[str, Any]:
    """The options of the function that selects codes, which the package holds as a ``functools.partial``."""
    return codebook.gumbel_sample.keywords if isinstance(codebook.gumbel_sample, partial) else {}


def _samples(codebook: Quantizer, temperature: float) -> bool:
    """Whether a training step samples or mixes codes, which needs all distances."""
    options = _selection_options(codebook)
    return temperature > 0 and bool(options.get("stochastic") or options.get("straight_through"))


def _unsupported_codebook(module: Quantizer) -> str | None:
    _keep_from_tracing()
    expected = (module.num_codebooks, module.codebook_size)
    if module.embed.dim() != 3 or module.embed.shape[:2] != expected:
        return f"embed is {tuple(module.embed.shape)}, expected [{expected[0]}, {expected[1]}, d]"
    select = getattr(module.gumbel_sample, "func", module.gumbel_sample)
    known = {"stochastic", "straight_through"}
    if select is not source_of(module).gumbel_sample or not {*_selection_options(module)} <= known:
        return "gumbel_sample, which chooses the code, is not the package's"
    return kmeans_mismatch(type(module).init_embed_, _kmeans)


def _calls_codebook(module: Quantizer, vectors: Vectors) -> list[Call]:
    heads, num_codes, dim = module.embed.shape
    rows = 8 if module.initted else min((num_codes + 1) // 2, 512)  # k-means warns of fewer vectors than codes
    x = (
        vectors(module.embed, heads, vectors.batch, rows, dim)
        if heads > 1
        else vectors(module.embed, vectors.batch, rows, dim)
    )
    if module.use_cosine_sim:
        x = F.normalize(x, dim=-1)
    if not module.initted:
        return [Call("forward", (x,))]
    lengths = [[rows if row % 2 == 0 else rows // 2] for row in range(vectors.batch)]
    mask = torch.arange(rows, device=x.device) < torch.tensor(lengths, device=x.device)
    calls = [Call("forward", (x,)), Call("forward", (x,), {"mask": mask})]
    if not module.affine_param:
        indices = torch.arange(x[..., 0].numel(), device=x.device).view(x.shape[:-1]) % num_codes
        calls.append(Call("update_indices", (x, indices), {"mask": mask}))
    return calls


class _SimVQ:
    """SimVQ, alone and in ResidualSimVQ: the codes are a learned map of a frozen codebook."""

    def forward(self: Quantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels_last = x.movedim(1, -1) if self.channel_first else x
        shape = channels_last.shape
        x = channels_last.reshape(shape[0], -1, shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # for exact indices the codes must not be rounded
            codebook = self.codebook
        indices = nearest(x, codebook)
        rows = in_matmul_dtype(F.embedding(indices, codebook), x)
        weight = self.input_to_quantize_commit_loss_weight
        loss = (F.mse_loss(x.detach(), rows) + weight * F.mse_loss(x, rows.detach())) * self.commitment_weight
        quantized = source_of(self).rotate_to(x, rows) if self.rotation_trick else x + (rows - x).detach()
        quantized = quantized.reshape(shape)
        return quantized.movedim(-1, 1) if self.channel_first else quantized, indices.reshape(shape[:-1]), loss


def _unsupported_simvq(module: Quantizer) -> str | None:
    with torch.no_grad():
        codes = module.codebook
    if codes.dim() != 2 or len(codes) != module.codebook_size:
        return f"the codebook is {tuple(codes.shape)}, expected [{module.codebook_size}, d]"
    return None


def _calls_simvq(module: Quantizer, vectors: Vectors) -> list[Call]:
    with torch.no_grad():
        codes = module.codebook
    dim = codes.shape[1]
    shape = (vectors.batch, dim, 4, 8) if module.channel_first else (vectors.batch, 4, 8, dim)
    return [Call("forward", (vectors(codes, *shape),))]


_PACKAGE = "vector_quantize_pytorch"
FAMILIES = (
    Family(
        "vector-quantize-pytorch Codebook",
        (f"{_PACKAGE}.{_PACKAGE}.Codebook",),
        _Codebook,
        _unsupported_codebook,
        _calls_codebook,
        "initted",
    ),
    Family(
        "vector-quantize-pytorch SimVQ",
        (f"{_PACKAGE}.sim_vq.SimVQ",),
        _SimVQ,
        _unsupported_simvq,
        _calls_simvq,
    ),
)
