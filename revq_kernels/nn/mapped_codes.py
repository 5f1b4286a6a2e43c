"""Codes that are a trained map of a frozen table."""

import torch
from torch import Tensor, nn


class MappedCodes(nn.Module):
    """``projector(table)`` as the codes of a `FastChannelVQ` (``codes=MappedCodes(...)``): all codes move together.

    SimVQ (Zhu et al. 2024): a random table of width d and ``nn.Linear(d, d)``.  VQGAN-LC (Zhu et al. 2024): features of
    another network, of any width f, and ``nn.Linear(f, d)``.  Search, `decode` and gradients all see the mapped codes;
    the gradient goes through the codes that were chosen into the projector.  The projector runs in float32 under autocast
    too, once per call.

    Args:
        table: ``[G, K, f]``, or ``[K, f]`` for one codebook.
        projector: a module from ``[G, K, f]`` to ``[G, K, d]``.

    Attributes:
        table: buffer float32 ``[G, K, f]``.

    Raises:
        ValueError: for a table of another rank.
    """

    def __init__(self, table: Tensor, projector: nn.Module) -> None:
        super().__init__()
        if table.dim() not in (2, 3):
            raise ValueError(f"table: expected [G, K, f] or [K, f], got shape {tuple(table.shape)}")
        self.register_buffer("table", table.detach().float().reshape(-1, *table.shape[-2:]).clone())
        self.projector = projector

    def forward(self) -> Tensor:
        """float32 ``[G, K, d]``."""
        with torch.autocast(self.table.device.type, enabled=False):
            return self.projector(self.table)
