"""How one quantizer cuts its input: `split_tokens` with its options settled, and what follows from them."""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from revq_kernels.nn.layout import CHANNEL_AXIS, Layout, Split, check_layout, check_split, merge_tokens, split_tokens
from revq_kernels.nn.masks import token_mask


@dataclass(frozen=True)
class Arrangement:
    """Latents of one layout, or tokens ``[B, T, d]``, as tokens of d numbers for G groups.

    Without a layout, four dimensions are BCHW and three are tokens that nothing cuts any more.

    Raises:
        ValueError: for an unknown layout or split.
    """

    code_dim: int
    num_groups: int
    layout: Layout | None
    split: Split

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.layout is not None:
            check_layout(self.layout)

    def tokens(self, x: Tensor) -> Tensor:
        """``[B, ...]`` -> ``[B, T, d]``, with T a multiple of G."""
        layout = self.layout_of(x)
        if layout is not None:
            x = split_tokens(x, self.code_dim, self.split, layout)
        elif x.dim() != 3 or x.shape[2] != self.code_dim:
            raise ValueError(f"x: expected [B, C, H, W] or [B, T, d={self.code_dim}], got shape {tuple(x.shape)}")
        if x.shape[1] % self.num_groups:
            raise ValueError(
                f"x: expected T to be a multiple of num_groups={self.num_groups}, got T={x.shape[1]} tokens"
            )
        return x

    def grouped(self, tokens: Tensor) -> Tensor:
        """``[B, T, ...]`` -> ``[B*T/G, G, ...]``: token t goes to group t mod G."""
        batch, num_tokens = tokens.shape[:2]
        return tokens.reshape(batch * num_tokens // self.num_groups, self.num_groups, *tokens.shape[2:])

    def like(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens ``[B, T, d]`` in the shape of the x that they were cut from."""
        layout = self.layout_of(x)
        return tokens if layout is None else merge_tokens(tokens, tuple(x.shape[1:]), self.split, layout)

    def latents(self, tokens: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """Tokens ``[B, T, d]`` as ``[B, *latent_shape]``."""
        return merge_tokens(tokens, latent_shape, self.split, self.layout or "BCHW")

    def mask(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """A mask or lengths of x's positions as bool ``[B, T]`` (see `token_mask`)."""
        if mask is None and lengths is None:
            return None
        num_tokens = prod(x.shape[1:]) // self.code_dim
        sizes = self.positions(x)
        return token_mask(
            mask, lengths, batch=x.shape[0], positions=None if sizes is None else prod(sizes), num_tokens=num_tokens
        )

    def by_position(self, indices: Tensor, x: Tensor) -> Tensor:
        """``[B, T]`` in the shape of x's positions, ``[B, H, W]`` or ``[B, H, W, pieces]``, where they hold whole tokens."""
        sizes = self.positions(x)
        if sizes is None or indices.shape[1] == 0 or indices.shape[1] % prod(sizes):
            return indices
        pieces = indices.shape[1] // prod(sizes)
        return indices.reshape(x.shape[0], *sizes, *([pieces] if pieces > 1 else []))

    def positions(self, x: Tensor) -> tuple[int, ...] | None:
        """The sizes of x without B and C; None where a token is no piece of one position's channels."""
        layout = self.layout_of(x)
        if layout is None:
            return (x.shape[1],)
        axis = CHANNEL_AXIS[layout]
        if self.split == "channel" or (self.split == "flat" and axis != len(layout) - 1):
            return None
        return tuple(size for place, size in enumerate(x.shape) if place not in (0, axis))

    def layout_of(self, x: Tensor) -> Layout | None:
        """The layout by which x is cut; None for tokens."""
        return "BCHW" if self.layout is None and x.dim() == 4 else self.layout
