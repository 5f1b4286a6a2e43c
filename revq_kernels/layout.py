"""A latent as tokens and back: the channel split of the paper (section 3.2.1, Appendix C) and the space split of its Table 3."""

import math
from typing import Literal

from torch import Tensor

Split = Literal["channel", "space"]


def split_tokens(latents: Tensor, code_dim: int, split: Split = "channel") -> Tensor:
    """Cut each latent into tokens of ``code_dim`` numbers.

    ``channel`` reads the latent in (C, h, w) order, so that a token is a piece of one channel's map (or several whole
    maps): a view on contiguous memory.  ``space`` reads it in (h, w, C) order, so that a token is a piece of one
    position's channel vector (or several neighbouring positions): a copy.

    Args:
        latents: ``[B, C, h, w]``.
        code_dim: d, a divisor of C*h*w.

    Returns:
        ``[B, T, d]`` with T = C*h*w / d.

    Raises:
        ValueError: if the latents are not four-dimensional, d does not divide C*h*w, or the split is unknown.
    """
    check_split(split)
    if latents.dim() != 4:
        raise ValueError(f"latents: expected [B, C, h, w], got shape {tuple(latents.shape)}")
    size = math.prod(latents.shape[1:])
    if code_dim < 1 or size % code_dim:
        raise ValueError(
            f"code_dim: expected a divisor of C*h*w={size} for latents {tuple(latents.shape)}, got {code_dim}"
        )
    if split == "space":
        latents = latents.permute(0, 2, 3, 1)
    return latents.reshape(latents.shape[0], size // code_dim, code_dim)


def merge_tokens(tokens: Tensor, latent_shape: tuple[int, int, int], split: Split = "channel") -> Tensor:
    """Put tokens back together: the inverse of `split_tokens`.

    Args:
        tokens: ``[B, T, d]``.
        latent_shape: (C, h, w) with C*h*w = T*d.

    Returns:
        ``[B, C, h, w]``, a view of contiguous tokens.

    Raises:
        ValueError: if the sizes do not fit, or the split is unknown.
    """
    check_split(split)
    channels, height, width = latent_shape
    if tokens.dim() != 3 or tokens.shape[1] * tokens.shape[2] != channels * height * width:
        raise ValueError(
            f"tokens: expected [B, T, d] with T*d={channels * height * width} for latent_shape {tuple(latent_shape)}, "
            f"got shape {tuple(tokens.shape)}"
        )
    batch = tokens.shape[0]
    if split == "space":
        return tokens.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return tokens.reshape(batch, channels, height, width)


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is a known split."""
    if split not in ("channel", "space"):
        raise ValueError(f"split: expected 'channel' or 'space', got {split!r}")
