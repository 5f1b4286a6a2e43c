"""Non-activation reset: move codes that nothing chose beside the codes that were chosen most."""

import torch
from torch import Tensor

from revq_kernels.validation import check_codebook, check_count, check_reset


@torch.no_grad()
def reset_codes_(
    codebook: Tensor,
    count: Tensor,
    *,
    noise: float = 0.1,
    max_fraction: float = 1.0,
    pairing: str = "paper",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move each dead code onto a busy one, plus noise (paper, Eq. 2 and section 3.2.2).

    Per group the codes are ordered by (count, index); the first r, all with count 0, are moved.  With the pairing of
    the paper the u-th code takes the row of the u-th from the end: the deadest goes to the busiest.  The released code
    pairs the same rows the other way round inside the dead block: the last of the r goes to the busiest.  Every source
    row is read before any row is written, and a pair whose source is itself dead is skipped.

    Which rows move, and onto which, is the same on every device; the noise is the same per device type for one
    generator: it is drawn for the moved rows only, in the order of their group and index.

    Args:
        codebook: ``[G, K, d]``, changed in place.
        count: int64 ``[G, K]``, how often each code was chosen; left as it is.
        noise: standard deviation of the Gaussian noise, in the units of the codebook (the release: 0.1).
        max_fraction: share of K that may move in one call, rounded down to whole codes (the paper: 1.0; the release: 0.2).
        pairing: "paper" or "release".
        generator: source of the noise, on the codebook's device.

    Returns:
        bool ``[G, K]``: the rows that were moved, whose optimizer state the caller should clear.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
    """
    check_codebook(codebook)
    num_groups, num_codes, _ = codebook.shape
    check_count(count, num_groups, num_codes, codebook)
    check_reset(noise, max_fraction, pairing)

    order = torch.sort(count, dim=1, stable=True).indices  # [G, K], deadest first
    limit = int(max_fraction * num_codes)
    dead = (count == 0).sum(dim=1, keepdim=True).clamp(max=limit)  # [G, 1], the r of Eq. 2
    position = torch.arange(num_codes, device=count.device).expand(num_groups, num_codes)
    target = order
    if pairing == "release":
        target = torch.where(position < dead, order.gather(1, (dead - 1 - position).clamp(min=0)), order)
    source = order.flip(1)
    paired = (position < dead) & (count.gather(1, source) > 0)
    partner = torch.full_like(count, -1).scatter_(1, target, torch.where(paired, source, -1))
    moved = partner >= 0
    group, code = moved.nonzero(as_tuple=True)  # on a device, the one time that the host waits for it
    rows = codebook[group, partner[group, code]].float()  # [moved, d]
    if noise > 0:
        rows += noise * torch.randn(rows.shape, generator=generator, device=codebook.device)
    codebook[group, code] = rows.to(codebook.dtype)
    return moved
