"""VAR's multi-scale residual quantizer (FoundationVision/VAR, models/quant.py), restated.

Kept: constructor, names of attributes and state, the scales' order of operations, the convolution that each scale picks by
its place between 0 and 1, the record of hits (in training within a process group), that ``forward`` asks for the size of the
process group and so raises where there is none.  Left out: what reads indices alone (``embed_to_fhat``,
``idxBl_to_var_input``, ``get_next_autoregressive_input``), ``eini`` and ``extra_repr``.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.third_party_quantizers import process_group as dist


class VectorQuantizer2(nn.Module):
    """``[B, Cvae, H, W]`` -> (quantized, usages or None, loss); H = W = the last of ``v_patch_nums``."""

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: tuple[int, ...] | None = None,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ) -> None:
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.v_patch_nums, self.quant_resi_ratio = v_patch_nums, quant_resi

        def phi() -> nn.Module:
            return Phi(Cvae, quant_resi) if abs(quant_resi) > 1e-6 else nn.Identity()

        if share_quant_resi == 0:
            self.quant_resi = PhiNonShared([phi() for _ in range(default_qresi_counts or len(v_patch_nums))])
        elif share_quant_resi == 1:
            self.quant_resi = PhiShared(phi())
        else:
            self.quant_resi = PhiPartiallyShared(nn.ModuleList(phi() for _ in range(share_quant_resi)))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(v_patch_nums), vocab_size))
        self.record_hit, self.prog_si = 0, -1
        self.embedding = nn.Embedding(vocab_size, Cvae)

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """All scales from small to large, each on the residual of the previous scales."""
        features = f_BChw.float()
        fixed = features.detach()
        rest, found, loss, scales = fixed.clone(), torch.zeros_like(fixed), 0.0, len(self.v_patch_nums)
        with torch.autocast("cuda", enabled=False):
            for scale, side in enumerate(self.v_patch_nums):
                indices = self._search(self._resized(rest, (side, side), scale == scales - 1))
                hits = indices.bincount(minlength=self.vocab_size).float()
                step = self._step(indices.view(len(fixed), side, side), fixed.shape[-2:], scale, scales)
                found, rest = found + step, rest - step
                if self.training and dist.initialized():
                    torch.distributed.all_reduce(hits)
                    kept = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
                    self.ema_vocab_hit_SV[scale] = self.ema_vocab_hit_SV[scale] * kept + hits * (1 - kept)
                    self.record_hit += 1
                loss = loss + self.beta * F.mse_loss(found.detach(), features) + F.mse_loss(found, fixed)
            loss, found = loss / scales, (found.detach() - fixed) + features
        tokens = torch.distributed.get_world_size() * features.numel() / features.shape[1]
        hit_enough = self.ema_vocab_hit_SV >= 0.08 * tokens / self.vocab_size
        return found, [100 * row.float().mean().item() for row in hit_enough] if ret_usages else None, loss

    def f_to_idxBl_or_fhat(self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: tuple | None = None) -> list[Tensor]:
        """The sum up to each scale, or the scale's indices ``[B, side * side]``."""
        rest = f_BChw.detach().clone()
        found, results = torch.zeros_like(rest), []
        sides = [(side, side) if isinstance(side, int) else tuple(side) for side in v_patch_nums or self.v_patch_nums]
        assert sides[-1] == rest.shape[-2:], f"{sides[-1]} != {rest.shape[-2:]}"
        for scale, size in enumerate(sides):
            if 0 <= self.prog_si < scale:
                break
            indices = self._search(self._resized(rest, size, scale == len(sides) - 1)).view(len(rest), *size)
            step = self._step(indices, rest.shape[-2:], scale, len(sides))
            found, rest = found + step, rest - step
            results.append(found if to_fhat else indices.flatten(1))
        return results

    def _resized(self, rest: Tensor, size: tuple[int, int], last: bool) -> Tensor:
        small = rest if last else F.interpolate(rest, size=size, mode="area")
        return small.permute(0, 2, 3, 1).reshape(-1, rest.shape[1])

    def _search(self, rows: Tensor) -> Tensor:
        codes = self.embedding.weight.data
        if self.using_znorm:
            return (F.normalize(rows, dim=-1) @ F.normalize(codes.t(), dim=0)).argmax(1)
        distances = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
        return distances.addmm_(rows, codes.t(), alpha=-2, beta=1).argmin(1)

    def _step(self, indices: Tensor, size: torch.Size, scale: int, scales: int) -> Tensor:
        step = self.embedding(indices).permute(0, 3, 1, 2)
        if scale != scales - 1:
            step = F.interpolate(step, size=size, mode="bicubic")
        return self.quant_resi[scale / (scales - 1)](step.contiguous())


class Phi(nn.Conv2d):
    """A weighted sum of the input and a convolution of it."""

    def __init__(self, embed_dim: int, quant_resi: float) -> None:
        super().__init__(embed_dim, embed_dim, kernel_size=3, padding=1)
        self.resi_ratio = abs(quant_resi)

    def forward(self, h_BChw: Tensor) -> Tensor:
        """The shape stays."""
        return h_BChw * (1 - self.resi_ratio) + super().forward(h_BChw) * self.resi_ratio


class PhiShared(nn.Module):
    """One convolution for all scales."""

    def __init__(self, qresi: nn.Module) -> None:
        super().__init__()
        self.qresi = qresi

    def __getitem__(self, place: float) -> nn.Module:
        return self.qresi


class PhiPartiallyShared(nn.Module):
    """A few convolutions; a scale uses the one nearest to its position."""

    def __init__(self, qresi_ls: nn.ModuleList) -> None:
        super().__init__()
        self.qresi_ls, self.ticks = qresi_ls, _ticks(len(qresi_ls))

    def __getitem__(self, place: float) -> nn.Module:
        return self.qresi_ls[_nearest_tick(self.ticks, place)]


class PhiNonShared(nn.ModuleList):
    """A convolution for each scale."""

    def __init__(self, qresi: list[nn.Module]) -> None:
        super().__init__(qresi)
        self.ticks = _ticks(len(qresi))

    def __getitem__(self, place: float) -> nn.Module:
        return super().__getitem__(_nearest_tick(self.ticks, place))


def _ticks(count: int) -> np.ndarray:
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    return np.linspace(edge, 1 - edge, count)


def _nearest_tick(ticks: np.ndarray, place: float) -> int:
    return np.abs(ticks - place).argmin().item()
