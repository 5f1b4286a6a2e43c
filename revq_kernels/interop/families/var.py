"""VAR's multi-scale residual quantizer, by what it holds: each scale searches for what the smaller ones left over."""

from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revq_kernels.interop.families.process_group import sums_over_processes
from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import count_choices, has_zero_code, most_aligned, nearest


class _Indices:
    def f_to_idxBl_or_fhat(self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: tuple | None = None) -> list[Tensor]:
        H, W = f_BChw.shape[-2:]
        rest = f_BChw.detach().clone()
        found, results = torch.zeros_like(rest), []
        sizes = [(pn, pn) if isinstance(pn, int) else (pn[0], pn[1]) for pn in (v_patch_nums or self.v_patch_nums)]
        assert sizes[-1][0] == H and sizes[-1][1] == W, (
            f"the last of v_patch_nums is {sizes[-1]}, the features {(H, W)}"
        )
        for si, size in enumerate(sizes):
            if 0 <= self.prog_si < si:
                break
            indices = _search(self, rest, size, si == len(sizes) - 1)
            step = _step(self, indices, (H, W), si, len(sizes))
            found.add_(step)
            rest.sub_(step)
            results.append(found.clone() if to_fhat else indices.flatten(1))
        return results


class _Var:
    f_to_idxBl_or_fhat = _Indices.f_to_idxBl_or_fhat

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple:
        if f_BChw.dtype != torch.float32:
            f_BChw = f_BChw.float()
        fixed = f_BChw.detach()
        rest, found = fixed.clone(), torch.zeros_like(fixed)
        with torch.autocast("cuda", enabled=False):
            loss, SN = 0.0, len(self.v_patch_nums)
            for si, pn in enumerate(self.v_patch_nums):
                indices = _search(self, rest, (pn, pn), si == SN - 1)
                step = _step(self, indices, fixed.shape[-2:], si, SN)
                found = found + step
                rest -= step.detach()
                if self.training and sums_over_processes(type(self)):
                    hits = count_choices(indices.flatten(), self.vocab_size).float()
                    torch.distributed.all_reduce(hits)
                    if self.record_hit == 0:
                        self.ema_vocab_hit_SV[si].copy_(hits)
                    elif self.record_hit < 100:
                        self.ema_vocab_hit_SV[si].mul_(0.9).add_(hits.mul(0.1))
                    else:
                        self.ema_vocab_hit_SV[si].mul_(0.99).add_(hits.mul(0.01))
                    self.record_hit += 1
                loss += F.mse_loss(found.data, f_BChw).mul_(self.beta) + F.mse_loss(found, fixed)
            loss *= 1.0 / SN
            found = (found.data - fixed).add_(f_BChw)
        usages = None
        if ret_usages:
            margin = torch.distributed.get_world_size() * (f_BChw.numel() / f_BChw.shape[1]) / self.vocab_size * 0.08
            usages = [(hits >= margin).float().mean().item() * 100 for hits in self.ema_vocab_hit_SV]
        return found, usages, loss


def _search(module: nn.Module, rest: Tensor, size: tuple[int, int], last: bool) -> Tensor:
    """Indices ``[B, *size]`` of ``rest`` at that size."""
    small = rest if last else F.interpolate(rest, size=size, mode="area")
    rows, codes = small.permute(0, 2, 3, 1).reshape(-1, rest.shape[1]), module.embedding.weight.detach()
    if module.using_znorm:
        indices = most_aligned(F.normalize(rows, dim=-1), F.normalize(codes.T, dim=0).T)
    else:
        indices = nearest(rows, codes)
    return indices.view(rest.shape[0], *size)


def _step(module: nn.Module, indices: Tensor, size: tuple[int, int], si: int, SN: int) -> Tensor:
    """What a scale adds, at full size."""
    step = module.embedding(indices).permute(0, 3, 1, 2)
    step = F.interpolate(step, size=tuple(size), mode="bicubic").contiguous() if si != SN - 1 else step.contiguous()
    return module.quant_resi[si / (SN - 1)](step)


def _unfit(module: nn.Module) -> str | None:
    attrgetter("beta", "using_znorm", "quant_resi", "record_hit", "prog_si")(module)
    table = module.embedding.weight
    expected, found = (module.vocab_size, module.Cvae), tuple(table.shape)
    if expected != found:
        return f"embedding.weight is {found}, expected {expected}"
    if not all(isinstance(pn, int) for pn in module.v_patch_nums) or len(module.v_patch_nums) < 2:
        return f"v_patch_nums is {module.v_patch_nums}, expected two or more integers"
    if tuple(module.ema_vocab_hit_SV.shape) != (len(module.v_patch_nums), module.vocab_size):
        return f"ema_vocab_hit_SV is {tuple(module.ema_vocab_hit_SV.shape)}"
    return "a code is 0, and has no direction" if module.using_znorm and has_zero_code(table) else None


def _features(module: nn.Module, vectors: Vectors) -> Tensor:
    return vectors(module.embedding.weight, 2, module.Cvae, module.v_patch_nums[-1], module.v_patch_nums[-1])


def _index_calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    features = _features(module, vectors)
    return [Call("f_to_idxBl_or_fhat", (features, False)), Call("f_to_idxBl_or_fhat", (features, True))]


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("forward", (_features(module, vectors),)), *_index_calls(module, vectors)]


FAMILIES = (
    Family("VAR", ("*.VectorQuantizer2",), _Var, _unfit, _calls),
    # the released forward asks for the size of a process group: without one it cannot be checked
    Family("VAR (indices)", ("*.VectorQuantizer2",), _Indices, _unfit, _index_calls),
)
