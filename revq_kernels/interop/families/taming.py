"""Quantizers of taming-transformers' line, known by name and contents: VectorQuantizer2 (taming, IBQ), SimVQ."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq_kernels.interop.families import embedding_parts as parts
from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import nearest, nearest_normalized


class _Taming:
    """taming-transformers: VectorQuantizer2, which SEED-Voken's IBQ has with ``l2_normalize``."""

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple]:
        _only_for_gumbel(temp, rescale_logits, return_logits)
        z = parts.to_channels_last(z)
        search = nearest_normalized if getattr(self, "l2_normalize", False) else nearest
        indices = search(z.view(-1, self.e_dim), self.embedding.weight)
        z_q, loss = parts.straight_through(z, self.embedding(indices).view(z.shape), self.beta, self.legacy)
        z_q = parts.to_channels_first(z_q)
        return z_q, loss, (None, None, parts.arranged(self, indices, z_q))

    def remap_to_used(self, inds: Tensor) -> Tensor:
        return parts.remap_to_used(self, inds)


class _SimVQ:
    """SimVQ: SimVQ and SimVQ1D, whose codes are a linear map of a frozen table."""

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[tuple, tuple]:
        _only_for_gumbel(temp, rescale_logits, return_logits)
        z = z.movedim(1, -1).contiguous()
        assert z.shape[-1] == self.e_dim
        with torch.autocast(z.device.type, enabled=False):  # the search wants the codes in float32, not rounded
            codebook = self.embedding_proj(self.embedding.weight)
        indices = nearest(z.view(-1, self.e_dim), codebook)
        rows = parts.in_matmul_dtype(F.embedding(indices, codebook), z).view(z.shape)
        z_q, loss = parts.straight_through(z, rows, self.beta, self.legacy)
        z_q = z_q.movedim(-1, 1).contiguous()
        zero = torch.tensor(0.0)  # on the CPU wherever z is, as the original's
        breakdown = sys.modules[self.__module__].LossBreakdown(zero, zero, loss, zero)
        return (z_q, zero, parts.arranged(self, indices, z_q)), breakdown

    def remap_to_used(self, inds: Tensor) -> Tensor:
        return parts.remap_to_used(self, inds)


def _only_for_gumbel(temp: float | None, rescale_logits: bool, return_logits: bool) -> None:
    assert temp is None or temp == 1.0, "Only for interface compatible with Gumbel"
    assert rescale_logits == False, "Only for interface compatible with Gumbel"  # noqa: E712
    assert return_logits == False, "Only for interface compatible with Gumbel"  # noqa: E712


def _unfit(module: nn.Module) -> str | None:
    if module.legacy not in (True, False) or (module.remap is not None and module.used.dim() != 1):
        return f"legacy={module.legacy!r}, remap={module.remap!r}: expected a bool, and None or a list of indices"
    if not isinstance(module.sane_index_shape, bool) or not isinstance(module.beta, float | int):
        return f"sane_index_shape={module.sane_index_shape!r}, beta={module.beta!r}: expected a bool and a number"
    return parts.wrong_table(module, module.n_e, module.e_dim)


def _unfit_simvq(module: nn.Module) -> str | None:
    if tuple(module.embedding_proj.weight.shape) != (module.e_dim, module.e_dim):
        return f"embedding_proj.weight is {tuple(module.embedding_proj.weight.shape)}, expected [d, d]"
    if not hasattr(sys.modules.get(module.__module__), "LossBreakdown"):
        return f"{module.__module__} has no LossBreakdown to return"
    return _unfit(module)


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, 2, module.e_dim, 4, 8),))]


def _calls_1d(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, 2, module.e_dim, 32),))]


FAMILIES = (
    Family("taming, IBQ VectorQuantizer2", ("*.VectorQuantizer2",), _Taming, _unfit, _calls),
    Family("SimVQ", ("*.SimVQ",), _SimVQ, _unfit_simvq, _calls),
    Family("SimVQ1D", ("*.SimVQ1D",), _SimVQ, _unfit_simvq, _calls_1d),
)
