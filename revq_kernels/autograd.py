"""Gradients, outside the operator boundary."""

from typing import Any

import torch
from torch import Tensor

from revq_kernels import ops


class CodebookGradient(torch.autograd.Function):
    """Identity on rows that were gathered from a codebook; sends their gradient back to it as a segment sum."""

    @staticmethod
    def forward(codebook: Tensor, quantized: Tensor, indices: Tensor, variant: str) -> Tensor:
        """Returns ``quantized`` as a node that depends on ``codebook``."""
        return quantized.clone()  # a view would forbid in-place operations on the result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
        """Keep what the sum needs."""
        codebook, _, indices, variant = inputs
        ctx.save_for_backward(indices)
        ctx.num_codes, ctx.dtype, ctx.variant = codebook.shape[1], codebook.dtype, variant

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of row k is the sum of the gradients of the queries that chose it."""
        (indices,) = ctx.saved_tensors
        return SegmentSum.apply(grad, indices, ctx.num_codes, ctx.variant).to(ctx.dtype), None, None, None


class SegmentSum(torch.autograd.Function):
    """The segment sum as a node of its own, so that a gradient of the gradient is right as well."""

    @staticmethod
    def forward(grad: Tensor, indices: Tensor, num_codes: int, variant: str) -> Tensor:
        """grad ``[..., G, d]`` -> float32 ``[G, K, d]``."""
        return ops.overload("segment_sum", variant)(grad.detach(), indices, num_codes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, str], output: Tensor) -> None:
        """Keep what the gather needs."""
        ctx.save_for_backward(inputs[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The sum is linear: each query gets the gradient of its code."""
        (indices,) = ctx.saved_tensors
        group = torch.arange(grad.shape[0], device=grad.device)
        return grad[group, indices].to(ctx.dtype), None, None, None
