"""The two halves of the VQ loss (van den Oord et al. 2017, Eq. 3)."""

import torch
from torch import Tensor


def mean_square(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (a - b)^2 over ``[B, T, d]``, or over the tokens of mask bool ``[B, T]``: a float32 scalar, 0 for none."""
    if mask is None:
        if a.numel() == 0:
            return (a.float() - b.float()).sum()  # a mean of nothing is NaN
        return torch.nn.functional.mse_loss(a.float(), b.float())
    # the masked differences become 0 before they are squared: a padding of NaN gives neither a value nor a gradient
    difference = torch.where(mask[..., None], a.float() - b.float(), 0.0)
    return difference.square().sum() / (mask.sum() * a.shape[-1]).clamp(min=1)


def vq_losses(
    tokens: Tensor, quantized: Tensor, mask: Tensor | None, weights: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum, the codebook loss and the commitment loss: float32 scalars.

    The codebook loss draws codes to tokens, the commitment loss tokens to codes; both have one value.  A term of weight 0
    is only that value: no gradient.
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


def loss_weights(commitment: float, legacy_beta: bool, learned_codes: bool) -> tuple[float, float]:
    """The weights of (codebook loss, commitment loss).

    ``commitment`` weighs the second, as in the paper; ``legacy_beta`` puts it on the first, as VQGAN's code does (taming
    #57) and the checkpoints trained with it.  Codes that do not learn by gradient have no codebook loss.
    """
    codebook, to_codes = (commitment, 1.0) if legacy_beta else (1.0, commitment)
    return (codebook if learned_codes else 0.0), to_codes


def check_commitment(commitment: float) -> None:
    """Raise ValueError for a weight that is negative or no number."""
    if not commitment >= 0:
        raise ValueError(f"commitment: expected a weight >= 0, got {commitment}")
