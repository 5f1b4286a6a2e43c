"""This library's searches: brute force, a `CodebookIndex` built once, and one that is refit before every search."""

from typing import Any

from torch import Tensor

from benchmarks.providers.provider import Provider
from revq_kernels import CodebookIndex, explain, nearest_code

STEP = 1e-3
"""How far a refit moves the codes, in their standard deviations: the size of an optimizer's late steps."""


class RefitIndex:
    """An index that is refit before every search, alternating between two codebooks that differ by a small step."""

    def __init__(self, codebook: Tensor) -> None:
        self.index = CodebookIndex(codebook)
        self.codebooks = [codebook, codebook + STEP * codebook.std() * codebook.sign()]
        self.calls = 0

    def nearest_code(self, x: Tensor) -> Tensor:
        """Refit and search."""
        self.index.refit(self.codebooks[self.calls % 2])
        self.calls += 1
        return self.index.nearest_code(x)


def _describe(index: CodebookIndex) -> str:
    groups, codes, dim = index.shape
    return f"tree: visits {index.visited:.2%}, {index.nbytes / (4 * groups * codes * dim):.3f}x the codebook"


def _search(x: Tensor, prepared: Any) -> Tensor:
    return prepared.nearest_code(x)


BRUTE_FORCE = Provider(
    name="revq",
    tuning="this library, nothing set",
    call=nearest_code,
    runs_on=("cpu", "cuda"),
    ours=True,
    describe=lambda x, codebook: str(explain(x, codebook)),
)
INDEX = Provider(
    name="revq, index",
    tuning="CodebookIndex, built once",
    call=_search,
    prepare=CodebookIndex,
    ours=True,
    describe=lambda x, index: _describe(index),
)
REFIT = Provider(
    name="revq, refit",
    tuning="CodebookIndex, refit before every search",
    call=_search,
    prepare=RefitIndex,
    ours=True,
    describe=lambda x, refit: f"{_describe(refit.index)}, {refit.index.rebuilds} rebuilds",
)
PROVIDERS = (BRUTE_FORCE, INDEX, REFIT)
