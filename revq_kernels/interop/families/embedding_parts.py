"""What quantizers around ``embedding.weight`` ``[K, d]`` share: losses, remapped indices, rows in a matmul's dtype."""

import torch
from torch import Tensor, nn


def straight_through(z: Tensor, rows: Tensor, beta: float, legacy: bool) -> tuple[Tensor, Tensor]:
    """The rows with z's gradient, and the loss; ``legacy`` has beta on the codebook's term, as checkpoints expect."""
    if legacy:
        loss = torch.mean((rows.detach() - z) ** 2) + beta * torch.mean((rows - z.detach()) ** 2)
    else:
        loss = beta * torch.mean((rows.detach() - z) ** 2) + torch.mean((rows - z.detach()) ** 2)
    return z + (rows - z).detach(), loss


def to_channels_last(z: Tensor) -> Tensor:
    """``[B, C, H, W]`` as contiguous ``[B, H, W, C]``."""
    return z.permute(0, 2, 3, 1).contiguous()


def to_channels_first(z: Tensor) -> Tensor:
    """``[B, H, W, C]`` as contiguous ``[B, C, H, W]``."""
    return z.permute(0, 3, 1, 2).contiguous()


def in_matmul_dtype(rows: Tensor, z: Tensor | None = None) -> Tensor:
    """``rows`` in the dtype in which a matmul would have given them, which autocast decides.

    Or in that of ``z``, with which they are to be combined, where it is wider: what comes of both has it anyway.
    """
    device = rows.device.type
    if not torch.is_autocast_enabled(device):
        return rows
    dtype = torch.get_autocast_dtype(device)
    return rows.to(dtype if z is None else torch.promote_types(dtype, z.dtype))


def arranged(module: nn.Module, indices: Tensor, quantized: Tensor) -> Tensor:
    """Flat indices as ``remap`` and ``sane_index_shape`` of taming's quantizers would have them."""
    if module.remap is not None:
        indices = module.remap_to_used(indices.reshape(quantized.shape[0], -1)).reshape(-1, 1)
    if module.sane_index_shape:
        indices = indices.reshape(quantized.shape[0], quantized.shape[2], quantized.shape[3])
    return indices


def remap_to_used(module: nn.Module, inds: Tensor) -> Tensor:
    """taming's method of that name, by bisection: it compares every index with every entry of ``used``."""
    shape = inds.shape
    assert len(shape) > 1
    inds = inds.reshape(shape[0], -1)
    used, order = module.used.to(inds).sort(stable=True)
    place = torch.searchsorted(used, inds).clamp(max=len(used) - 1)  # the first of equals, as argmax gives
    unknown = used[place] != inds
    new = order[place]
    if module.unknown_index == "random":
        new[unknown] = torch.randint(0, module.re_embed, size=new[unknown].shape).to(device=new.device)
    else:
        new[unknown] = module.unknown_index
    return new.reshape(shape)


def wrong_table(module: nn.Module, *shape: int) -> str | None:
    """Why ``embedding.weight`` is not what a family expects; None if it is."""
    table = module.embedding.weight
    if tuple(table.shape) != shape:
        return f"embedding.weight is {tuple(table.shape)}, expected {shape}"
    return None
