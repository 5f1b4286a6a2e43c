"""Which tokens count: masks, and lengths of samples that were padded."""

import torch
from torch import Tensor


def token_mask(
    mask: Tensor | None, lengths: Tensor | None, *, batch: int, positions: int | None, num_tokens: int
) -> Tensor | None:
    """A mask of positions, or lengths, as a mask of tokens.

    Args:
        mask: bool ``[B, L]``, True for a position that counts, or ``[B, 1]`` for whole samples, or None.
        lengths: integer ``[B]``, how many leading positions count, or None.
        batch: B.
        positions: L; each is T / L tokens that lie together.  None: tokens are no pieces of positions.
        num_tokens: T.

    Returns:
        bool ``[B, T]``, or None where everything counts.

    Raises:
        ValueError: for other shapes, for both at once, and where one token holds several positions.
        TypeError: for other dtypes.
    """
    for name, value in (("mask", mask), ("lengths", lengths)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if mask is not None and lengths is not None:
        raise ValueError("mask: expected None beside lengths, got both")
    if positions is None and (lengths is not None or (mask is not None and mask.shape[-1] != 1)):
        raise ValueError("mask: expected [B, 1], as this split's tokens are no pieces of positions, got another")
    if lengths is not None:
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths: expected [B={batch}], got shape {tuple(lengths.shape)}")
        mask = torch.arange(positions, device=lengths.device) < lengths[:, None]
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (1, positions):
        raise ValueError(f"mask: expected [B={batch}, L={positions}] or [B, 1], got shape {tuple(mask.shape)}")
    if mask.shape[1] == 1:
        return mask.expand(batch, num_tokens)
    if positions is None or (num_tokens % positions if positions else num_tokens):
        raise ValueError(f"mask: expected whole tokens per position, got T={num_tokens} tokens of L={positions}")
    return mask.repeat_interleave(num_tokens // max(1, positions), dim=1)


def count_masked_(count: Tensor, indices: Tensor, mask: Tensor) -> None:
    """Add to count int64 ``[G, K]`` how often each code stands in indices ``[N, G]`` where mask bool ``[N, G]`` is True."""
    count.scatter_add_(1, indices.T, mask.T.long())
