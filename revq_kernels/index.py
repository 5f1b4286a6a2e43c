"""`CodebookIndex`: an exact search tree over a codebook, which compares a query with few of its codes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from revq_kernels import native
from revq_kernels.validation import check_codebook, check_index_query

LEAF_CODES = 16
"""Codes per leaf: one SIMD panel (csrc/cpu/index/layout.h)."""
BUILD_VISITS = 16
"""Cost of a build per leaf and level of splits, in leaf visits: each level sorts all codes once."""


LEAST_CODES, LARGEST_DIM = 8192, 8
"""A tree over fewer codes, or over codes of more elements, compares too large a part of them (`tree_pays`)."""


def tree_pays(num_codes: int, code_dim: int, num_queries: int) -> bool:
    """A rule of thumb: whether building a `CodebookIndex` saves time for this many queries per group.

    A tree has saved the time of its build after some thousand queries per group, at most K/2 in the rows of
    docs/benchmarks.md (build, brute force and index), if d is small: then most codes of a large codebook are not compared.

    Args:
        num_codes: K.
        code_dim: d.
        num_queries: of each group, over all searches to come.
    """
    return num_codes >= LEAST_CODES and code_dim <= LARGEST_DIM and num_queries >= num_codes // 2


class Visits(NamedTuple):
    """What searches did; each field is a sum over queries and groups."""

    queries: int = 0
    leaves: int = 0
    """Leaves whose codes were compared."""
    blocks: int = 0
    """Blocks of 16 bounding boxes whose distances were computed; one costs about as much as two leaves."""
    scanned: int = 0
    """Queries that were compared with all codes, because they or the codes of their group are not finite."""

    def __add__(self, other: "Visits") -> "Visits":  # type: ignore[override]
        return Visits(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def cost(self) -> int:
        """The cost of the visits in units of one leaf visit."""
        return self.leaves + 2 * self.blocks


class CodebookIndex:
    """An exact search tree over a copy of a codebook, on the CPU.

    ``index.nearest_code(x)`` returns what ``nearest_code(x, codebook)`` returned when the index was built or last refit,
    bit for bit, for every input: ties, duplicate codes, denormals, overflow, NaN and infinities included.  What it saves
    depends on the data: at d = 4 a query is compared with a small part of a large codebook, but for Gaussian data at
    d = 16 with most of it, and then `nearest_code` is the faster search.  ``visited`` shows that share.

    Frozen use (tokens of a data set): build once, search often.  Training: call `refit` after each optimizer step.  It
    keeps the tree and moves its bounding boxes with the codes; once the searches since the last build have lost as much
    time to old splits as a build costs, `refit` builds a new tree.

    The tree owns a copy of the codes: changing the codebook has no effect until `refit`.  Searches may run in several
    threads at the same time, but `refit` must not run during a search.

    Args:
        codebook: ``[G, K, d]``, float32, bfloat16 or float16 (converted exactly), any strides, on the CPU.

    Attributes:
        shape: (G, K, d).
        rebuilds: how often `refit` has built a new tree.
        fits: whether the splits were made for the current codes, with no `refit` since.

    Raises:
        ValueError, TypeError: for a codebook that `nearest_code` would not take, or that is not on the CPU.
        NativeUnavailableError: without the compiled library.
    """

    def __init__(self, codebook: Tensor) -> None:
        _check(codebook)
        native.require()
        self.shape: tuple[int, int, int] = tuple(codebook.shape)  # type: ignore[assignment]
        self.rebuilds = 0
        self._excess = 0.0  # cost of searches beyond that of a new tree, in leaf visits
        self._build(codebook)

    def nearest_code(self, x: Tensor) -> Tensor:
        """The contract's index of each query.

        Args:
            x: ``[..., G, d]``, float32, bfloat16 or float16 (converted exactly), any strides, on the CPU.

        Returns:
            int64 ``[..., G]``, each in [0, K).

        Raises:
            ValueError: for another shape or device.
            TypeError: for another dtype, or something that is no tensor.
        """
        check_index_query(x, self.shape)
        indices, done = torch.ops.revq.index_search(x.detach(), *self._arrays, self.shape[1])
        if not torch.compiler.is_compiling():  # a graph has no values to count
            self.last = Visits(indices.numel(), *done.tolist())
            self._note(self.last)
        return indices

    def refit(self, codebook: Tensor) -> None:
        """Take over the codes of ``codebook``, of the same shape: keep the tree, or build a new one if that is cheaper.

        Raises:
            ValueError, TypeError: as for the constructor, and for another shape.
        """
        self._check_same_shape(codebook)
        if self._excess >= self._build_cost:
            self.rebuilds += 1
            self._build(codebook)
        else:
            torch.ops.revq.index_refit_(*self._arrays, _rows(codebook))
            self.fits, self._visits = False, Visits()

    @property
    def visited(self) -> float:
        """Share of the codes that a query was compared with, mean since the last build or refit; NaN before a search."""
        visits = self._visits
        whole = visits.queries * self.leaves
        return (visits.leaves + visits.scanned * self.leaves) / whole if whole else math.nan

    @property
    def leaves(self) -> int:
        """Leaves per group."""
        return -(-self.shape[1] // LEAF_CODES)

    @property
    def nbytes(self) -> int:
        """Memory of the tree in bytes: the codes, their indices and the boxes."""
        return sum(array.nbytes for array in self._arrays)

    def __repr__(self) -> str:
        groups, codes, dim = self.shape
        return f"CodebookIndex(G={groups}, K={codes}, d={dim}, visited={self.visited:.2%}, rebuilds={self.rebuilds})"

    def _build(self, codebook: Tensor) -> None:
        with torch.inference_mode(False):  # a tree built in that mode could not be refit outside it
            self._arrays = torch.ops.revq.index_build(_rows(codebook))
        self.fits, self._excess = True, 0.0
        self._fresh = Visits()  # of searches with splits that fit the codes
        self._visits = self.last = Visits()

    def _note(self, visits: Visits) -> None:
        """Add up the cost of searches, by which `refit` decides."""
        self._visits += visits
        if self.fits or not self._fresh.queries:
            self._fresh += visits
        else:
            self._excess += visits.cost - self._fresh.cost / self._fresh.queries * visits.queries
            self._excess = max(0.0, self._excess)

    @property
    def _build_cost(self) -> float:
        """Cost of building the trees of all groups, in leaf visits."""
        return BUILD_VISITS * self.shape[0] * self.leaves * max(1, (self.leaves - 1).bit_length())

    def _check_same_shape(self, codebook: Tensor) -> None:
        _check(codebook)
        if tuple(codebook.shape) != self.shape:
            raise ValueError(f"codebook: expected the index's shape {self.shape}, got {tuple(codebook.shape)}")


def _check(codebook: Tensor) -> None:
    check_codebook(codebook)
    if codebook.device.type != "cpu":
        raise ValueError(f"codebook: expected a CPU tensor, got one on {codebook.device}")


def _rows(codebook: Tensor) -> Tensor:
    return codebook.detach().to(torch.float32).contiguous()
