"""A latent as tokens and back: the channel split of the paper (section 3.2.1, Appendix C), the space split of its Table 3,
and the layouts that other models use."""

import math
from typing import Literal

from torch import Tensor

Layout = Literal["BCHW", "BLC", "BDT", "BTCHW", "BCDHW"]
"""Images; sequences with their features last, or, as audio models write it, with their features D first; videos; volumes."""
Split = Literal["channel", "last", "flat", "space"]
"""See `split_tokens`; "space" is the paper's word for "last"."""

CHANNEL_AXIS = {"BCHW": 1, "BLC": 2, "BDT": 1, "BTCHW": 2, "BCDHW": 1}


def split_tokens(latents: Tensor, code_dim: int, split: Split = "channel", layout: Layout = "BCHW") -> Tensor:
    """Cut each latent into tokens of ``code_dim`` numbers.

    ``channel`` reads the latent in (C, positions) order, so that a token is a piece of one channel's map (or several
    whole maps): a view on contiguous memory of a layout with C first.  ``last`` (also ``space``) reads it in
    (positions, C) order, so that a token is a piece of one position's channel vector (or several neighboring
    positions).  ``flat`` reads it in the order of its layout.

    Args:
        latents: ``[B, ...]`` with the dimensions of ``layout``.
        code_dim: d, a divisor of the numbers of a sample.

    Returns:
        ``[B, T, d]`` with T*d numbers of a sample.

    Raises:
        ValueError: for a latent of another rank, a d that does not divide it, or an unknown split or layout.
    """
    check_split(split)
    check_layout(layout)
    if latents.dim() != len(layout):
        raise ValueError(f"latents: expected [{', '.join(layout)}], got shape {tuple(latents.shape)}")
    size = math.prod(latents.shape[1:])
    if code_dim < 1 or size % code_dim:
        raise ValueError(
            f"code_dim: expected a divisor of {'*'.join(layout[1:])}={size} for latents {tuple(latents.shape)}, "
            f"got {code_dim}"
        )
    latents = latents.movedim(CHANNEL_AXIS[layout], _channel_target(split, layout))
    return latents.reshape(latents.shape[0], size // code_dim, code_dim)


def merge_tokens(
    tokens: Tensor, latent_shape: tuple[int, ...], split: Split = "channel", layout: Layout = "BCHW"
) -> Tensor:
    """Put tokens back together: the inverse of `split_tokens`.

    Args:
        tokens: ``[B, T, d]``.
        latent_shape: the sizes of ``layout`` without B, for BCHW (C, h, w), whose product is T*d.

    Returns:
        ``[B, *latent_shape]``, a view of contiguous tokens.

    Raises:
        ValueError: if the sizes do not fit, or the split or layout is unknown.
    """
    check_split(split)
    check_layout(layout)
    size = math.prod(latent_shape)
    if len(latent_shape) != len(layout) - 1:
        raise ValueError(f"latent_shape: expected ({', '.join(layout[1:])}), got {tuple(latent_shape)}")
    if tokens.dim() != 3 or tokens.shape[1] * tokens.shape[2] != size:
        raise ValueError(
            f"tokens: expected [B, T, d] with T*d={size} for latent_shape {tuple(latent_shape)}, "
            f"got shape {tuple(tokens.shape)}"
        )
    axis, target = CHANNEL_AXIS[layout], _channel_target(split, layout)
    sizes = list(latent_shape)
    sizes.insert(target - 1, sizes.pop(axis - 1))
    return tokens.reshape(tokens.shape[0], *sizes).movedim(target, axis)


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is a known split."""
    if split not in ("channel", "last", "flat", "space"):
        raise ValueError(f"split: expected 'channel', 'last' (also called 'space') or 'flat', got {split!r}")


def check_layout(layout: str) -> None:
    """Raise ValueError unless ``layout`` is a known layout."""
    if layout not in CHANNEL_AXIS:
        raise ValueError(f"layout: expected one of {tuple(CHANNEL_AXIS)}, got {layout!r}")


def _channel_target(split: Split, layout: Layout) -> int:
    """Where the channels stand when the tokens are cut."""
    return {"channel": 1, "flat": CHANNEL_AXIS[layout]}.get(split, len(layout) - 1)
