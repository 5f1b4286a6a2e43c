"""This library's own ways to search, each held to the contract before it is timed."""

from typing import Any

from revq_kernels.automatic import AutomaticIndex
from torch import Tensor

from benchmarks.providers.provider import Provider
from revq_kernels import CodebookIndex, explain, nearest_code

STEP = 1e-3
"""How far the codes of the refit row move in a step, in their standard deviations: an optimizer's late steps."""


class Training:
    """An index that is refit before every search, to codes that move back and forth."""

    def __init__(self, codebook: Tensor) -> None:
        self.index = CodebookIndex(codebook)
        self.codebooks = [codebook, codebook + STEP * codebook.std() * codebook.sign()]
        self.calls = 0

    def nearest_code(self, x: Tensor) -> Tensor:
        """Refit and search."""
        self.index.refit(self.codebooks[self.calls % 2])
        self.calls += 1
        return self.index.nearest_code(x)


class Automatic:
    """The search of `FastChannelVQ` in evaluation mode: brute force or a tree, as the data will have it."""

    def __init__(self, codebook: Tensor) -> None:
        self.index, self.codebook = AutomaticIndex(), codebook

    def nearest_code(self, x: Tensor) -> Tensor:
        """Whichever way it has chosen."""
        return self.index.nearest_code(x, self.codebook)


def _shown(index: CodebookIndex) -> str:
    groups, codes, dim = index.shape
    return f"tree: visits {index.visited:.2%}, {index.nbytes / (4 * groups * codes * dim):.3f}x the codebook"


def _query(x: Tensor, prepared: Any) -> Tensor:
    return prepared.nearest_code(x)


BRUTE = Provider(
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
    call=_query,
    prepare=CodebookIndex,
    ours=True,
    describe=lambda x, index: _shown(index),
)
REFIT = Provider(
    name="revq, refit",
    tuning="CodebookIndex, refit before every search",
    call=_query,
    prepare=Training,
    ours=True,
    describe=lambda x, training: f"{_shown(training.index)}, {training.index.rebuilds} rebuilds",
)
AUTOMATIC = Provider(
    name="revq, automatic",
    tuning="AutomaticIndex, as in evaluation mode, after 40 calls or 4 s",
    call=_query,
    prepare=Automatic,
    ours=True,
    warm_calls=40,
    describe=lambda x, automatic: str(automatic.index),
)
PROVIDERS = (BRUTE, INDEX, REFIT, AUTOMATIC)
