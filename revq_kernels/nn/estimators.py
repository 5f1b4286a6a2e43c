"""Gradients for the input of a quantizer: an argmin has no slope, so one is made up."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Estimator = Literal["straight_through", "rotation", "none"]


class StraightThrough(torch.autograd.Function):
    """The value of ``quantized`` with the gradient of ``x`` (Bengio et al. 2013).

    ``x + (quantized - x).detach()`` means the same and returns other last bits than the codebook holds.
    """

    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        """Returns ``quantized`` as a node that depends on ``x``."""
        return quantized.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Passes the gradient to ``x`` unchanged."""
        return grad, None


class Rotation(torch.autograd.Function):
    """The value of ``quantized`` with the gradient of a rotated and rescaled ``x`` (Fifty et al. 2024).

    Per token, quantized = lambda R x with lambda = |q|/|x| and R the rotation in the plane of x and q that takes one's
    direction to the other's.  With unit vectors e of x and f of q, and r that of e + f,

        R = I - 2 r r^T + 2 f e^T,    so the gradient is    lambda (g - 2 r (r.g) + 2 e (f.g)),

    lambda and R being constants.  A token of zeros has no direction and gets g unchanged; where q = -x, r is 0.
    """

    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        """Both ``[..., d]``; returns ``quantized`` as a node that depends on ``x``."""
        return quantized.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the two directions."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """R^T, by products of vectors: no matrix is built."""
        x, quantized = (tensor.detach().float() for tensor in ctx.saved_tensors)  # constants in a second gradient too
        length = x.norm(dim=-1, keepdim=True)
        e, f = x / length, F.normalize(quantized, dim=-1)
        r = F.normalize(e + f, dim=-1)
        g = grad.float()
        turned = g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * e * (f * g).sum(-1, keepdim=True)
        scaled = turned * (quantized.norm(dim=-1, keepdim=True) / length)
        return torch.where(length > 0, scaled, g).to(grad.dtype), None


def estimate(estimator: Estimator, x: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` ``[..., d]``, bit for bit, with the gradient to ``x`` that the estimator gives it."""
    if estimator == "none":
        return quantized
    function = StraightThrough if estimator == "straight_through" else Rotation
    return function.apply(x, quantized.detach())


def check_estimator(estimator: str) -> None:
    """Raise ValueError unless ``estimator`` is known."""
    if estimator not in ("straight_through", "rotation", "none"):
        raise ValueError(f"estimator: expected 'straight_through', 'rotation' or 'none', got {estimator!r}")
