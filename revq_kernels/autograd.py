"""Gradients of the operations, outside the operators: the gather of codes and its transpose, the segment sum."""

from typing import Any

import torch
from torch import Tensor

from revq_kernels.dispatch import operator


class CodebookGradient(torch.autograd.Function):
    """Identity on rows that were gathered from a codebook; sends their gradient back to it as a segment sum."""

    @staticmethod
    def forward(codebook: Tensor, quantized: Tensor, indices: Tensor, impl: str, deterministic: bool) -> Tensor:
        """Returns ``quantized`` as a node that depends on ``codebook``."""
        return quantized.clone()  # a view would forbid in-place operations on the result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str, bool], output: Tensor) -> None:
        """Save what the sum needs."""
        codebook, _, indices, impl, deterministic = inputs
        ctx.save_for_backward(indices)
        ctx.num_codes, ctx.dtype, ctx.options = codebook.shape[1], codebook.dtype, (impl, deterministic)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient of row k is the sum of the gradients of the queries with index k."""
        (indices,) = ctx.saved_tensors
        return SegmentSum.apply(grad, indices, ctx.num_codes, *ctx.options).to(ctx.dtype), None, None, None, None


class SegmentSum(torch.autograd.Function):
    """The segment sum as a node of its own, so that second derivatives are right as well."""

    @staticmethod
    def forward(values: Tensor, indices: Tensor, num_codes: int, impl: str, deterministic: bool) -> Tensor:
        """values ``[..., G, d]`` -> float32 ``[G, K, d]``."""
        return operator("segment_sum", impl, values, deterministic)(values.detach(), indices, num_codes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, str, bool], output: Tensor) -> None:
        """Save what the gather needs."""
        ctx.save_for_backward(inputs[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The sum is linear: each query gets the gradient of its code."""
        (indices,) = ctx.saved_tensors
        group = torch.arange(grad.shape[0], device=grad.device)
        return grad[group, indices].to(ctx.dtype), None, None, None, None
