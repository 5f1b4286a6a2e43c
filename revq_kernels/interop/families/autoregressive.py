"""Quantizers of autoregressive image generators: LlamaGen, UniTok and VAR, and the entropy loss of the first two."""

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from revq_kernels.interop.families.family import Call, Family, Quantizer, Vectors, source_of
from revq_kernels.interop.search import code_counts, has_zero_code, largest_inner_product, nearest

_PAIRS, _CPU_PAIRS = 1 << 21, 1 << 18
"""Limit on the distances held at a time, in each of a few temporaries; on a CPU they should fit into its cache."""


def code_entropies(x: Tensor, codes: Tensor, temperature: float, eps: float) -> tuple[Tensor, Tensor]:
    """Entropies of ``softmax(-|x - c|^2 / temperature)`` over all codes: the mean entropy of the rows, that of the mean row.

    The second is ``-sum(p * log(p + eps))``.  Both carry exact gradients to ``x`` ``[N, d]`` and ``codes`` ``[K, d]``, for
    which the backward pass computes blocks of rows again, so no N x K matrix exists.  float32, also under autocast; float64
    if either operand is.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.float64 if torch.float64 in (x.dtype, codes.dtype) else torch.float32
        return _Entropies.apply(x.to(wide), codes.to(wide), temperature, eps)


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, temperature: float, eps: float) -> tuple[Tensor, Tensor]:
        mean, of_rows = codes.new_zeros(len(codes)), codes.new_zeros(())
        for rows in _blocks(x, codes):
            log_p = _log_softmax(rows, codes, temperature)
            p = log_p.exp()
            mean += p.sum(0)
            of_rows -= p.mul_(log_p).sum()
        mean /= len(x)
        ctx.save_for_backward(x, codes, mean)
        ctx.temperature, ctx.eps = temperature, eps
        return of_rows / len(x), -(mean * (mean + eps).log()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_mean: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, codes, mean = ctx.saved_tensors
        slope = grad_mean * ((mean + ctx.eps).log() + mean / (mean + ctx.eps))
        scale = 2 / (len(x) * ctx.temperature)  # 2 from the square in the distance
        grad_x, grad_codes = [], torch.zeros_like(codes)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(x, codes):
                log_p = _log_softmax(rows, codes, ctx.temperature)
                p = log_p.exp()
                grad = log_p.mul_(grad_rows).add_(slope)
                grad = p.mul_(grad - (p * grad).sum(1, keepdim=True)).mul_(scale)  # to half the squared distances
                grad_x.append(rows * grad.sum(1, keepdim=True) - grad @ codes)
                grad_codes += codes * grad.sum(0).unsqueeze(1) - grad.T @ rows
        return torch.cat(grad_x), grad_codes, None, None


def _blocks(x: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    pairs = _CPU_PAIRS if x.device.type == "cpu" else _PAIRS
    return x.split(max(1, pairs // len(codes)))


def _log_softmax(rows: Tensor, codes: Tensor, temperature: float) -> Tensor:
    distances = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
    return distances.addmm_(rows, codes.T, alpha=-2).div_(-temperature).log_softmax(1)


def _sums_over_processes(module: Quantizer) -> bool:
    """Whether a quantizer sums over processes: as its repository's own module ``dist`` says, or torch without one."""
    own: Any = getattr(source_of(module), "dist", None)
    if hasattr(own, "initialized"):
        return bool(own.initialized())
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _usage_weight(steps: int) -> float:
    """The weight of a new value in the moving averages of code usage, after ``steps`` values."""
    return 1.0 if steps == 0 else 0.1 if steps < 100 else 0.01


# LlamaGen

_TEMPERATURE, _EPS = 0.01, 1e-5


class _LlamaGen:
    """LlamaGen: VectorQuantizer, with four losses in training, one of them an entropy over all codes."""

    def forward(self: Quantizer, z: Tensor) -> tuple:
        z = z.permute(0, 2, 3, 1).contiguous()
        rows, codes = z.view(-1, self.e_dim), self.embedding.weight
        if self.l2_norm:
            z, rows, codes = (F.normalize(tensor, dim=-1) for tensor in (z, rows, codes))
        indices = nearest(rows, codes)
        quantized = codes[indices].view(z.shape)
        losses: tuple = (None, None, None)
        usage: float = 0
        if self.training:
            if self.show_usage:
                used = self.codebook_used.detach()  # LlamaGen registers it as a parameter; a leaf takes no assignment
                used.copy_(used.roll(-len(indices)))
                used[-len(indices) :] = indices
                usage = len(used.unique()) / self.n_e
            losses = (
                torch.mean((quantized - z.detach()) ** 2),
                self.beta * torch.mean((quantized.detach() - z) ** 2),
                self.entropy_loss_ratio * _entropy_loss(rows, codes, self.entropy_loss_ratio),
            )
        quantized = z + (quantized - z).detach()
        return quantized.permute(0, 3, 1, 2), (*losses, usage), (None, None, indices)


def _entropy_loss(rows: Tensor, codes: Tensor, ratio: float) -> Tensor:
    if ratio == 0:  # the product with 0 is 0, with gradients 0, unless an operand is NaN or infinite
        return rows.sum() + codes.sum()
    of_rows, of_mean = code_entropies(rows, codes, _TEMPERATURE, _EPS)
    autocast = torch.is_autocast_enabled(rows.device.type)
    dtype = torch.float32 if autocast else torch.promote_types(rows.dtype, codes.dtype)
    return (of_rows - of_mean).to(dtype)


def _unsupported_llamagen(module: Quantizer) -> str | None:
    needed = ("beta", "l2_norm", "show_usage", "entropy_loss_ratio", "codebook_used" if module.show_usage else "n_e")
    attrgetter(*needed)(module)
    if hasattr(module, "groups"):
        return "MGVQ's returns the one-hot matrix and draws from a softmax over all vectors of the batch"
    expected, found = (module.n_e, module.e_dim), tuple(module.embedding.weight.shape)
    return None if expected == found else f"embedding.weight is {found}, expected {expected}"


def _calls_llamagen(module: Quantizer, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, vectors.batch, module.e_dim, 4, 8),))]


# UniTok


class _UniTok:
    """UniTok: one of the VectorQuantizers that stand side by side in VectorQuantizerM."""

    def forward(self: Quantizer, features: Tensor) -> tuple:
        batch, length, dim = features.shape
        features = F.normalize(features.reshape(-1, dim), dim=-1).float()
        codes = self.codebook.get_norm_weight()
        indices = largest_inner_product(features, codes)
        entropy_loss: Tensor | int = 0
        if self.use_entropy_loss:
            of_rows, of_mean = code_entropies(features, codes, 1 / self.inv_entropy_tau, 1e-7)
            entropy_loss = of_rows - of_mean
        rows = self.codebook(indices)
        vq_loss = self.beta * F.mse_loss(rows.detach(), features) + F.mse_loss(rows, features.detach())

        share = code_counts(indices, self.vocab_size).float()
        if self.training and _sums_over_processes(self):
            torch.distributed.all_reduce(share)
        share /= share.sum()
        usage = 100 * (share > 0.01 / self.vocab_size).float().mean()
        weight = _usage_weight(self.vocab_usage_record_times)
        self.vocab_usage.mul_(1 - weight).add_(share, alpha=weight)
        self.vocab_usage_record_times += 1
        return (features + (rows - features).detach()).view(batch, length, dim), vq_loss, entropy_loss, usage

    def f_to_idx(self: Quantizer, features: Tensor) -> Tensor:
        batch, length, dim = features.shape
        rows = F.normalize(features.reshape(-1, dim), dim=-1).float()
        return largest_inner_product(rows, self.codebook.get_norm_weight().float()).view(batch, length)


def _unsupported_unitok(module: Quantizer) -> str | None:
    attrgetter("beta", "vocab_usage", "vocab_usage_record_times", "use_entropy_loss", "inv_entropy_tau")(module)
    table = module.codebook.weight
    expected, found = (module.vocab_size, module.vocab_width), tuple(table.shape)
    if expected != found:
        return f"codebook.weight is {found}, expected {expected}"
    if not callable(module.codebook.get_norm_weight):
        return "codebook.get_norm_weight is no method"
    return "a code is 0, and has no direction" if has_zero_code(table) else None


def _calls_unitok(module: Quantizer, vectors: Vectors) -> list[Call]:
    features = vectors(module.codebook.weight, vectors.batch, 32, module.vocab_width)
    return [Call("forward", (features,)), Call("f_to_idx", (features,))]


# VAR


class _VarIndices:
    """VAR: the tokens of VectorQuantizer2, a residual quantizer in which each scale quantizes the residual of the smaller ones."""

    def f_to_idxBl_or_fhat(
        self: Quantizer, f_BChw: Tensor, to_fhat: bool, v_patch_nums: tuple | None = None
    ) -> list[Tensor]:
        height, width = f_BChw.shape[-2:]
        residual = f_BChw.detach().clone()
        quantized, results = torch.zeros_like(residual), []
        sizes = [(side, side) if isinstance(side, int) else tuple(side) for side in v_patch_nums or self.v_patch_nums]
        assert sizes[-1] == (height, width), f"the last of v_patch_nums is {sizes[-1]}, the features {(height, width)}"
        for scale in range(len(sizes) if self.prog_si < 0 else min(self.prog_si + 1, len(sizes))):
            indices = _search_scale(self, residual, sizes[scale], scale == len(sizes) - 1)
            step = _dequantize_scale(self, indices, sizes[-1], scale, len(sizes))
            quantized.add_(step)
            residual.sub_(step)
            results.append(quantized.clone() if to_fhat else indices.flatten(1))
        return results


class _Var:
    """VAR: VectorQuantizer2, with its training."""

    f_to_idxBl_or_fhat = _VarIndices.f_to_idxBl_or_fhat

    def forward(self: Quantizer, f_BChw: Tensor, ret_usages: bool = False) -> tuple:
        features = f_BChw.float()
        fixed = features.detach()
        residual, quantized = fixed.clone(), torch.zeros_like(fixed)
        scales = len(self.v_patch_nums)
        with torch.autocast("cuda", enabled=False):
            loss = 0.0
            for scale, side in enumerate(self.v_patch_nums):
                indices = _search_scale(self, residual, (side, side), scale == scales - 1)
                step = _dequantize_scale(self, indices, tuple(fixed.shape[-2:]), scale, scales)
                quantized = quantized + step
                residual -= step.detach()
                if self.training and _sums_over_processes(self):
                    hits = code_counts(indices.flatten(), self.vocab_size).float()
                    torch.distributed.all_reduce(hits)
                    weight = _usage_weight(self.record_hit)
                    self.ema_vocab_hit_SV[scale].mul_(1 - weight).add_(hits * weight)
                    self.record_hit += 1
                loss += self.beta * F.mse_loss(quantized.detach(), features) + F.mse_loss(quantized, fixed)
            loss *= 1 / scales
        usages = None
        if ret_usages:
            # A code counts as used above 8 % of its share of all tokens, if all codes were used equally
            tokens = torch.distributed.get_world_size() * (features.numel() / features.shape[1])
            used = self.ema_vocab_hit_SV >= tokens / self.vocab_size * 0.08
            usages = [row.float().mean().item() * 100 for row in used]
        return features + (quantized - fixed).detach(), usages, loss


def _search_scale(module: Quantizer, residual: Tensor, size: tuple[int, int], last: bool) -> Tensor:
    """Indices ``[B, *size]`` of the residual ``[B, C, H, W]`` at a scale."""
    small = residual if last else F.interpolate(residual, size=size, mode="area")
    rows, codes = small.permute(0, 2, 3, 1).reshape(-1, residual.shape[1]), module.embedding.weight.detach()
    if module.using_znorm:
        indices = largest_inner_product(F.normalize(rows, dim=-1), F.normalize(codes.T, dim=0).T)
    else:
        indices = nearest(rows, codes)
    return indices.view(residual.shape[0], *size)


def _dequantize_scale(module: Quantizer, indices: Tensor, size: tuple[int, ...], scale: int, scales: int) -> Tensor:
    """What a scale adds to the quantized features, at full size."""
    step = module.embedding(indices).permute(0, 3, 1, 2)
    if scale < scales - 1:
        step = F.interpolate(step, size=size, mode="bicubic")
    return module.quant_resi[scale / (scales - 1)](step.contiguous())


def _unsupported_var(module: Quantizer) -> str | None:
    attrgetter("beta", "using_znorm", "quant_resi", "record_hit", "prog_si")(module)
    table = module.embedding.weight
    expected, found = (module.vocab_size, module.Cvae), tuple(table.shape)
    if expected != found:
        return f"embedding.weight is {found}, expected {expected}"
    if not all(isinstance(side, int) for side in module.v_patch_nums) or len(module.v_patch_nums) < 2:
        return f"v_patch_nums is {module.v_patch_nums}, expected two or more integers"
    if tuple(module.ema_vocab_hit_SV.shape) != (len(module.v_patch_nums), module.vocab_size):
        return f"ema_vocab_hit_SV is {tuple(module.ema_vocab_hit_SV.shape)}"
    return "a code is 0, and has no direction" if module.using_znorm and has_zero_code(table) else None


def _var_features(module: Quantizer, vectors: Vectors) -> Tensor:
    return vectors(
        module.embedding.weight, vectors.batch, module.Cvae, module.v_patch_nums[-1], module.v_patch_nums[-1]
    )


def _calls_var_indices(module: Quantizer, vectors: Vectors) -> list[Call]:
    features = _var_features(module, vectors)
    return [Call("f_to_idxBl_or_fhat", (features, False)), Call("f_to_idxBl_or_fhat", (features, True))]


def _calls_var(module: Quantizer, vectors: Vectors) -> list[Call]:
    return [Call("forward", (_var_features(module, vectors),)), *_calls_var_indices(module, vectors)]


FAMILIES = (
    Family("LlamaGen", ("*.VectorQuantizer",), _LlamaGen, _unsupported_llamagen, _calls_llamagen),
    Family("UniTok", ("*.VectorQuantizer",), _UniTok, _unsupported_unitok, _calls_unitok),
    Family("VAR", ("*.VectorQuantizer2",), _Var, _unsupported_var, _calls_var),
    # The released forward needs a process group, so without one only the indices can be checked and patched
    Family("VAR (indices)", ("*.VectorQuantizer2",), _VarIndices, _unsupported_var, _calls_var_indices),
)
