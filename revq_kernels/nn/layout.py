"""How latents become tokens and queries, and how results take the latents' shape again.

`split_tokens` and `merge_tokens` are the channel split of the paper (section 3.2.1, Appendix C), the space split of its
Table 3, and the layouts of other models.  `TokenLayout` is the same with the options of one quantizer.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from revq_kernels.validation import check_tensor

Layout = Literal["BCHW", "BLC", "BDT", "BTCHW", "BCDHW"]
"""Images; sequences with features last, or, as audio models write them, with features (D) first; videos; volumes."""
Split = Literal["channel", "space", "flat"]
"""See `split_tokens`."""

CHANNEL_AXIS = {"BCHW": 1, "BLC": 2, "BDT": 1, "BTCHW": 2, "BCDHW": 1}


def split_tokens(latents: Tensor, code_dim: int, split: Split = "channel", layout: Layout = "BCHW") -> Tensor:
    """Cut each latent into tokens of ``code_dim`` elements.

    ``channel`` reads the latent in (C, positions) order, so that a token is a piece of one channel's map (or, where d is
    no divisor of the map's size, of several maps): a view, if the layout has C first and the memory is contiguous.
    ``space`` reads it in (positions, C) order, so that a token is a piece of one position's channel vector; if C is no
    multiple of d, a token has elements of several neighboring positions, which `FastChannelVQ` refuses.  ``flat`` reads it
    in the order of its layout.

    Args:
        latents: ``[B, ...]`` with the dimensions of ``layout``.
        code_dim: d, a divisor of the number of elements of a sample.

    Returns:
        ``[B, T, d]``; T*d is the number of elements of a sample.

    Raises:
        ValueError: for a latent of another rank, a d that does not divide it, or an unknown split or layout.
        TypeError: for latents that are no dense tensor, or a d that is no integer.
    """
    check_split(split)
    check_layout(layout)
    check_tensor("latents", latents)
    _check_integer("code_dim", code_dim)
    return _split(latents, code_dim, split, layout)


def merge_tokens(
    tokens: Tensor, latent_shape: tuple[int, ...], split: Split = "channel", layout: Layout = "BCHW"
) -> Tensor:
    """Put tokens together again: the inverse of `split_tokens`.

    Args:
        tokens: ``[B, T, d]``.
        latent_shape: the sizes of ``layout`` without B, for BCHW (C, h, w), whose product is T*d.

    Returns:
        ``[B, *latent_shape]``, a view of contiguous tokens.

    Raises:
        ValueError: if the sizes do not fit, or the split or layout is unknown.
        TypeError: for tokens that are no dense tensor, or sizes that are no integers.
    """
    check_split(split)
    check_layout(layout)
    check_tensor("tokens", tokens)
    return _merge(tokens, latent_shape, split, layout)


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is known."""
    if not isinstance(split, str) or split not in ("channel", "space", "flat"):
        raise ValueError(f"split: expected 'channel', 'space' or 'flat', got {split!r}")


def check_layout(layout: str) -> None:
    """Raise ValueError unless ``layout`` is known."""
    if not isinstance(layout, str) or layout not in CHANNEL_AXIS:
        raise ValueError(f"layout: expected one of {tuple(CHANNEL_AXIS)}, got {layout!r}")


@dataclass(frozen=True)
class TokenLayout:
    """The token options of one quantizer: latents of one layout, or tokens ``[B, T, d]``, for G groups.

    Without a layout, an input of four dimensions is BCHW, and one of three dimensions is already tokens.

    Raises:
        ValueError: for an unknown layout or split.
    """

    code_dim: int
    num_groups: int
    layout: Layout | None
    split: Split
    spans_positions: bool = False
    """Whether a token of the split "space" may have elements of several positions (d > C); else C is a multiple of d."""

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.layout is not None:
            check_layout(self.layout)

    def tokens(self, x: Tensor) -> Tensor:
        """``[B, ...]`` -> ``[B, T, d]``.

        Raises:
            ValueError: for another rank, a size that d does not divide, or a T that is no multiple of G.
            TypeError: for an x that is no dense floating-point tensor.
        """
        check_tensor("x", x)
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
        layout = self.layout_of(x)
        if layout is not None:
            if x.dim() == len(layout):
                self._check_channels("x", tuple(x.shape[1:]), layout)
            x = _split(x, self.code_dim, self.split, layout)
        elif x.dim() != 3 or x.shape[2] != self.code_dim:
            raise ValueError(f"x: expected [B, C, H, W] or [B, T, d={self.code_dim}], got shape {tuple(x.shape)}")
        if x.shape[1] % self.num_groups:
            raise ValueError(
                f"x: expected T to be a multiple of num_groups={self.num_groups}, got T={x.shape[1]} tokens"
            )
        return x

    def by_group(self, tokens: Tensor) -> Tensor:
        """``[B, T, ...]`` -> ``[N, G, ...]`` with N = B*T/G: token t belongs to group t mod G."""
        batch, num_tokens = tokens.shape[:2]
        return tokens.reshape(batch * num_tokens // self.num_groups, self.num_groups, *tokens.shape[2:])

    def restore(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens ``[B, T, d]`` in the shape of the x that they were cut from."""
        layout = self.layout_of(x)
        return tokens if layout is None else _merge(tokens, tuple(x.shape[1:]), self.split, layout)

    def latents(self, tokens: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """Tokens ``[B, T, d]`` as latents ``[B, *latent_shape]``."""
        layout = self.layout or "BCHW"
        latents = _merge(tokens, latent_shape, self.split, layout)
        self._check_channels("latent_shape", tuple(latent_shape), layout)
        return latents

    def mask(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """A mask or lengths of x's positions as bool ``[B, T]`` (see `token_mask`)."""
        if mask is None and lengths is None:
            return None
        for name, value in (("mask", mask), ("lengths", lengths)):
            # x may be a stand-in on the meta device, for its shape alone
            if isinstance(value, Tensor) and value.device != x.device and not x.is_meta:
                raise ValueError(f"{name}: expected x's device {x.device}, got {value.device}")
        sizes = self.positions(x)
        return token_mask(
            mask,
            lengths,
            batch=x.shape[0],
            positions=None if sizes is None else math.prod(sizes),
            num_tokens=math.prod(x.shape[1:]) // self.code_dim,
        )

    def by_position(self, indices: Tensor, x: Tensor) -> Tensor:
        """``[B, T]`` in the shape of x's positions: ``[B, H, W]``, or ``[B, H, W, pieces]`` for several tokens each.

        ``[B, T]`` unchanged where a position does not hold whole tokens.
        """
        sizes = self.positions(x)
        if sizes is None or indices.shape[1] == 0 or indices.shape[1] % math.prod(sizes):
            return indices
        pieces = indices.shape[1] // math.prod(sizes)
        return indices.reshape(x.shape[0], *sizes, *([pieces] if pieces > 1 else []))

    def positions(self, x: Tensor) -> tuple[int, ...] | None:
        """The sizes of x without B and C; None where tokens span positions (the channel split)."""
        layout = self.layout_of(x)
        if layout is None:
            return (x.shape[1],)
        axis = CHANNEL_AXIS[layout]
        if self.split == "channel" or (self.split == "flat" and axis != len(layout) - 1):
            return None
        return tuple(size for place, size in enumerate(x.shape) if place not in (0, axis))

    def _check_channels(self, name: str, latent_shape: tuple[int, ...], layout: Layout) -> None:
        """Raise ValueError where a token of the split "space" would span positions without being told to."""
        channels = latent_shape[CHANNEL_AXIS[layout] - 1]
        if self.split == "space" and not self.spans_positions and channels % self.code_dim:
            raise ValueError(
                f"{name}: expected C to be a multiple of code_dim={self.code_dim} for split='space', "
                f"got C={channels} in ({', '.join(layout[1:])}) = {latent_shape}"
            )

    def layout_of(self, x: Tensor) -> Layout | None:
        """The layout by which x is cut; None for tokens."""
        return "BCHW" if self.layout is None and x.dim() == 4 else self.layout


def token_mask(
    mask: Tensor | None, lengths: Tensor | None, *, batch: int, positions: int | None, num_tokens: int
) -> Tensor | None:
    """A mask of positions, or lengths, as a mask of tokens.

    Args:
        mask: bool ``[B, L]``, True for a position that counts, or ``[B, 1]`` for whole samples, or None.
        lengths: integer ``[B]``, how many leading positions count, or None.
        batch: B.
        positions: L; each consists of T / L consecutive tokens.  None: tokens span positions.
        num_tokens: T.

    Returns:
        bool ``[B, T]``, or None where everything counts.

    Lengths outside 0 ... L raise on the CPU.  On a GPU the host does not wait for them: the device stops with an assertion,
    as for an index out of bounds, which a later CUDA call reports.  A compiled graph asserts as well.

    Raises:
        ValueError: for other shapes, for both at once, where one token spans several positions, and for lengths outside
            0 ... L.
        TypeError: for other dtypes, and for what is no dense tensor.
    """
    for name, value in (("mask", mask), ("lengths", lengths)):
        if value is not None:
            check_tensor(name, value)
    if mask is not None and lengths is not None:
        raise ValueError("mask: expected None beside lengths, got both")
    if lengths is not None:
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
        if positions is None:
            raise ValueError("lengths: expected None, as tokens of this split span positions, got lengths of positions")
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths: expected [B={batch}], got shape {tuple(lengths.shape)}")
        lengths = lengths.long()  # torch compares some unsigned types with nothing
        _check_lengths(lengths, positions)
        mask = torch.arange(positions, device=lengths.device) < lengths[:, None]
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if positions is None and mask.shape[-1:] != (1,):
        raise ValueError("mask: expected [B, 1], as tokens of this split span positions, got a mask of positions")
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (1, positions):
        expected = f"[B={batch}, 1]" if positions is None else f"[B={batch}, L={positions}] or [B, 1]"
        raise ValueError(f"mask: expected {expected}, got shape {tuple(mask.shape)}")
    if mask.shape[1] == 1:
        return mask.expand(batch, num_tokens)
    if positions is None or (num_tokens % positions if positions else num_tokens):
        raise ValueError(f"mask: expected whole tokens per position, got T={num_tokens} tokens of L={positions}")
    return mask.repeat_interleave(num_tokens // max(1, positions), dim=1)


def _check_lengths(lengths: Tensor, positions: int) -> None:
    """Every length int64 ``[B]`` is in 0 ... L; see `token_mask` for where the error appears."""
    if lengths.is_meta or not lengths.shape[0]:
        return
    within = ((lengths >= 0) & (lengths <= positions)).all()
    if torch.compiler.is_compiling() or lengths.device.type == "cuda":
        torch._assert_async(within, "lengths: expected values from 0 to the number of positions")
    elif not bool(within):
        low, high = int(lengths.min()), int(lengths.max())
        raise ValueError(f"lengths: expected values from 0 to L={positions}, got {low} to {high}")


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, Integral | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")


def _split(latents: Tensor, code_dim: int, split: Split, layout: Layout) -> Tensor:
    """`split_tokens` for options that are already checked."""
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


def _merge(tokens: Tensor, latent_shape: tuple[int, ...], split: Split, layout: Layout) -> Tensor:
    """`merge_tokens` for options that are already checked."""
    if not isinstance(latent_shape, tuple | list):
        raise TypeError(f"latent_shape: expected ({', '.join(layout[1:])}), got {latent_shape!r}")
    for size in latent_shape:
        _check_integer("latent_shape", size)
    size = math.prod(latent_shape)
    if len(latent_shape) != len(layout) - 1:
        raise ValueError(f"latent_shape: expected ({', '.join(layout[1:])}), got {tuple(latent_shape)}")
    if tokens.dim() != 3 or tokens.shape[1] * tokens.shape[2] != size:
        raise ValueError(
            f"tokens: expected [B, T, d] with T*d={size} for latent_shape {tuple(latent_shape)}, "
            f"got shape {tuple(tokens.shape)}"
        )
    if min(latent_shape) < 0:
        raise ValueError(f"latent_shape: expected sizes >= 0, got {tuple(latent_shape)}")
    axis, target = CHANNEL_AXIS[layout], _channel_target(split, layout)
    sizes = list(latent_shape)
    sizes.insert(target - 1, sizes.pop(axis - 1))
    return tokens.reshape(tokens.shape[0], *sizes).movedim(target, axis)


def _channel_target(split: Split, layout: Layout) -> int:
    """The axis of the channels while the tokens are cut."""
    return {"channel": 1, "flat": CHANNEL_AXIS[layout], "space": len(layout) - 1}[split]
