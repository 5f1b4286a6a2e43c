"""Gradients, outside the operator boundary."""

from typing import Any

import torch
from torch import Tensor

from revq_kernels import ops


class CodebookGradient(torch.autograd.Function):
    """Identity on rows that were gathered from a codebook; sends their gradient back to it as a segment sum."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, quantized: Tensor, indices: Tensor, variant: str) -> Tensor:
        """Returns ``quantized`` as a node that depends on ``codebook``."""
        ctx.save_for_backward(indices)
        ctx.num_codes, ctx.dtype, ctx.variant = codebook.shape[1], codebook.dtype, variant
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of row k is the sum of the gradients of the queries that chose it."""
        (indices,) = ctx.saved_tensors
        total = ops.overload("codebook_grad", ctx.variant)(grad, indices, ctx.num_codes)
        return total.to(ctx.dtype), None, None, None


class StraightThrough(torch.autograd.Function):
    """The value of ``quantized`` with the gradient of ``x`` (Bengio et al. 2013).

    ``x + (quantized - x).detach()`` means the same and returns other last bits than the codebook holds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        """Returns ``quantized`` as a node that depends on ``x``."""
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Passes the gradient to ``x`` unchanged."""
        return grad, None
