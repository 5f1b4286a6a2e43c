"""How often an answer is not the nearest code: farther codes, and the wrong one of two equal codes."""

from typing import NamedTuple

import torch
from torch import Tensor

from revq_kernels.testing.exhaustive import exhaustive, squared_distance

PAIRS = {"cuda": 1 << 34, "cpu": 1 << 25}
"""Pairs that a check may look at; with more than that, evenly spaced queries stand for all."""

TOLERANCE = 1e-6


class Shares(NamedTuple):
    """Shares of the checked answers: a farther code, and another than the first of several equal codes."""

    farther: float
    other_twin: float


def spaced_rows(num_queries: int, pairs_per_query: int, device: torch.device) -> Tensor:
    """Numbers of the queries to check, int64, ascending and evenly spaced."""
    count = max(1, min(num_queries, PAIRS.get(device.type, 1 << 25) // pairs_per_query))
    return torch.arange(count, device=device) * num_queries // count


class Judge:
    """The float64 answers of one problem, found once and used for every provider.

    Args:
        x: ``[N, G, d]``.
        codebook: ``[G, K, d]``.
        rows: the queries to look at; None for as many evenly spaced ones as `PAIRS` allows.
    """

    def __init__(self, x: Tensor, codebook: Tensor, rows: Tensor | None = None) -> None:
        self.rows = spaced_rows(x.shape[0], codebook.shape[0] * codebook.shape[1], x.device) if rows is None else rows
        self.x, self.codebook = x[self.rows], codebook
        self.nearest = exhaustive(self.x, codebook, torch.float64)

    def shares(self, indices: Tensor) -> Shares:
        """Judge indices int64 ``[N, G]``; a number that is no code's counts as farther.

        Farther: the float64 squared distance exceeds the smallest by more than one part in a million.
        """
        indices = indices[self.rows].to(self.codebook.device).long()
        valid = (indices >= 0) & (indices < self.codebook.shape[1])
        group = torch.arange(self.codebook.shape[0], device=self.codebook.device)
        chosen = self.codebook[group, torch.where(valid, indices, 0)]
        distance = squared_distance(self.x, chosen, torch.float64)
        farther = ~valid | (distance > self.nearest.distance * (1 + TOLERANCE))
        equal = (chosen == self.codebook[group, self.nearest.index]).all(-1)
        other_twin = valid & equal & (indices != self.nearest.index)
        return Shares(farther.double().mean().item(), other_twin.double().mean().item())
