"""`Provider`: one way to find nearest codes, as the benchmarks call it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Provider:
    """One way to find nearest codes.

    Attributes:
        name: in rows and tables.
        tuning: how it is configured and why.
        call: x ``[N, G, d]`` and the codebook ``[G, K, d]``, or the result of ``prepare`` -> indices ``[N, G]``.
        prepare: work done once per codebook, timed separately; None if there is none.
        needs: the module it imports, None if torch is enough.
        runs_on: device types.
        capturable: whether the benchmark tries to capture it as a CUDA graph.
        max_code_dim: the largest d for which it is measured, None for any.
        ours: whether it belongs to this library; then it is not timed while one of its indices is wrong.
        describe: names the kernel that did the work, given x and what was prepared.
        slow_start: it compiles for each shape or d, so it is measured last.
    """

    name: str
    tuning: str
    call: Callable[[Tensor, Any], Tensor]
    prepare: Callable[[Tensor], Any] | None = None
    needs: str | None = None
    runs_on: tuple[str, ...] = ("cpu",)
    capturable: bool = True
    max_code_dim: int | None = None
    ours: bool = False
    describe: Callable[[Tensor, Any], str] | None = None
    slow_start: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot run here, or nothing."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"not installed: {self.needs}"
        return ""

    def prepared(self, codebook: Tensor) -> Any:
        """The second argument of ``call``."""
        return codebook if self.prepare is None else self.prepare(codebook)

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        """Prepare and call."""
        return self.call(x, self.prepared(codebook))
