"""The entropy terms of quantizer losses, without the N x K matrix of probabilities."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PAIRS, _CPU_PAIRS = 1 << 21, 1 << 18
"""Distances held at a time, in each of the few temporaries; a CPU is fastest where these stay in its cache."""


def code_entropies(x: Tensor, codes: Tensor, temperature: float, eps: float) -> tuple[Tensor, Tensor]:
    """Entropies of ``softmax(-|x - c|^2 / temperature)`` over all codes: the mean of the rows', and that of the mean row.

    The second is ``-sum(p * log(p + eps))``.  Both carry exact gradients to ``x`` ``[N, d]`` and ``codes`` ``[K, d]``, for
    which a few rows at a time are computed again.  float32 whatever autocast says, float64 if either operand is.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.float64 if torch.float64 in (x.dtype, codes.dtype) else torch.float32
        return _Entropies.apply(x.to(wide), codes.to(wide), temperature, eps)


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, temperature: float, eps: float) -> tuple[Tensor, Tensor]:
        mean, of_rows = codes.new_zeros(len(codes)), codes.new_zeros(())
        for rows in _parts(x, codes):
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
            for rows in _parts(x, codes):
                log_p = _log_softmax(rows, codes, ctx.temperature)
                p = log_p.exp()
                grad = log_p.mul_(grad_rows).add_(slope)
                grad = p.mul_(grad - (p * grad).sum(1, keepdim=True)).mul_(scale)  # to half the distances
                grad_x.append(rows * grad.sum(1, keepdim=True) - grad @ codes)
                grad_codes += codes * grad.sum(0).unsqueeze(1) - grad.T @ rows
        return torch.cat(grad_x), grad_codes, None, None


def _parts(x: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    pairs = _CPU_PAIRS if x.device.type == "cpu" else _PAIRS
    return x.split(max(1, pairs // len(codes)))


def _log_softmax(rows: Tensor, codes: Tensor, temperature: float) -> Tensor:
    distances = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
    return distances.addmm_(rows, codes.T, alpha=-2).div_(-temperature).log_softmax(1)
