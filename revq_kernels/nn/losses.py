"""The loss of a quantizer, and the estimators that make up a gradient for its input."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Estimator = Literal["straight_through", "rotation", "none"]


def loss_weights(commitment: float, legacy_beta: bool, learned_codes: bool) -> tuple[float, float]:
    """The weights of (codebook loss, commitment loss).

    ``commitment`` weighs the second, as in the paper; ``legacy_beta`` puts it on the first, as VQGAN's code does (taming
    #57) and the checkpoints trained with it.  Codes that do not learn by gradient have no codebook loss.
    """
    codebook, to_codes = (commitment, 1.0) if legacy_beta else (1.0, commitment)
    return (codebook if learned_codes else 0.0), to_codes


def vq_losses(
    tokens: Tensor, quantized: Tensor, mask: Tensor | None, weights: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The VQ loss (van den Oord et al. 2017, Eq. 3): the weighted sum, the codebook loss and the commitment loss.

    The codebook loss moves codes to tokens, the commitment loss tokens to codes; both have the same value.  A term of
    weight 0 is only that value and has no gradient.

    Args:
        tokens: ``[B, T, d]``.
        quantized: their codes, ``[B, T, d]``.
        mask: bool ``[B, T]``, the tokens that count, or None.
        weights: see `loss_weights`.

    Returns:
        Three float32 scalars.
    """
    terms = [
        mean_square(quantized, tokens.detach(), mask) if weights[0] else None,
        mean_square(tokens, quantized.detach(), mask) if weights[1] else None,
    ]
    value = next((term for term in terms if term is not None), None)
    if value is None:
        value = mean_square(tokens.detach(), quantized.detach(), mask)
    total = torch.zeros_like(value, requires_grad=False)
    for weight, term in zip(weights, terms, strict=True):
        if term is not None:
            total = total + (term if weight == 1 else weight * term)
    first, second = (value.detach() if term is None else term for term in terms)
    return total, first, second


def mean_square(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (a - b)^2 over ``[B, T, d]``, or over the tokens of mask bool ``[B, T]``: a float32 scalar, 0 for none."""
    if mask is None:
        if a.numel() == 0:
            return (a.float() - b.float()).sum()  # 0 with a gradient; the mean of an empty tensor is NaN
        return F.mse_loss(a.float(), b.float())
    # Masked differences become 0 before the square, so that padding of NaN contributes neither a value nor a gradient.
    difference = torch.where(mask[..., None], a.float() - b.float(), 0.0)
    return difference.square().sum() / (mask.sum() * a.shape[-1]).clamp(min=1)


def estimate(estimator: Estimator, x: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` ``[..., d]``, bit for bit, with the gradient that the estimator passes to ``x``.

    An argmin has no slope, so the estimator makes one up; "none" returns ``quantized`` as it is.
    """
    if estimator == "none":
        return quantized
    function = StraightThrough if estimator == "straight_through" else Rotation
    return function.apply(x, quantized.detach())


class StraightThrough(torch.autograd.Function):
    """The value of ``quantized`` with the gradient of ``x`` (Bengio et al. 2013).

    ``x + (quantized - x).detach()`` has the same meaning, but rounding makes its value differ from the code in the last
    bits.
    """

    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        """Returns ``quantized`` as a node that depends on ``x``."""
        return own_copy(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing to save."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Passes the gradient to ``x`` unchanged."""
        return grad, None


class Rotation(torch.autograd.Function):
    """The value of ``quantized`` with the gradient of a rotated and rescaled ``x`` (Fifty et al. 2024).

    Per token, quantized = lambda R x with lambda = |q|/|x| and R the rotation in the plane of x and q that takes one's
    direction to the other's.  With unit vectors e of x and f of q, and r that of e + f,

        R = I - 2 r r^T + 2 f e^T,    so the gradient is    lambda (g - 2 r (r.g) + 2 e (f.g)),

    where lambda and R are constants.  A zero token has no direction and gets g unchanged; where q = -x, r is 0.
    """

    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        """Both ``[..., d]``; returns ``quantized`` as a node that depends on ``x``."""
        return own_copy(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Save the two directions."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """R^T g by products of vectors, without building the matrix R."""
        x, quantized = (tensor.detach().float() for tensor in ctx.saved_tensors)  # constants in a second gradient too
        length = x.norm(dim=-1, keepdim=True)
        e, f = x / length, F.normalize(quantized, dim=-1)
        r = F.normalize(e + f, dim=-1)
        g = grad.float()
        turned = g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * e * (f * g).sum(-1, keepdim=True)
        scaled = turned * (quantized.norm(dim=-1, keepdim=True) / length)
        return torch.where(length > 0, scaled, g).to(grad.dtype), None


def own_copy(quantized: Tensor) -> Tensor:
    """A copy in memory of its own, for a result whose original a backward pass uses.

    A compiler removes a ``clone`` of a tensor that it believes nobody else holds, and then lets the backward pass write
    into the saved tensor, which the caller holds as the result.  An operator's result is memory of its own by contract.
    """
    return torch.ops.revq.copy(quantized) if torch.compiler.is_compiling() else quantized.clone()


@torch.library.custom_op("revq::copy", mutates_args=())
def _copy(x: Tensor) -> Tensor:
    return x.clone()


@_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def check_loss_options(commitment: float, estimator: str) -> None:
    """Raise ValueError for a commitment weight that is negative or NaN, or an unknown estimator."""
    if not commitment >= 0:
        raise ValueError(f"commitment: expected a weight >= 0, got {commitment}")
    if estimator not in ("straight_through", "rotation", "none"):
        raise ValueError(f"estimator: expected 'straight_through', 'rotation' or 'none', got {estimator!r}")
