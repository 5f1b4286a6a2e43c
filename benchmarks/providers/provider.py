"""What a provider is."""

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
        tuning: how it is set up and why.
        call: x ``[N, G, d]`` and the codebook ``[G, K, d]``, or what ``prepare`` made of it -> indices ``[N, G]``.
        prepare: work done once per codebook, timed apart; None if there is none.
        needs: the module it imports, None if torch is enough.
        runs_on: device types.
        capturable: whether a CUDA graph may be tried on it.
        max_code_dim: the largest d that makes sense, None for any.
        ours: this library; nothing of ours is timed while one of its indices is wrong.
        warm_calls: calls before anything is timed (or 4 s of them).
        describe: what did the work, after the warm calls, given x and what was prepared.
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
    warm_calls: int = 1
    describe: Callable[[Tensor, Any], str] | None = None
    slow_start: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot run here, or nothing."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"not installed: {self.needs}"
        return ""

    def prepared(self, codebook: Tensor) -> Any:
        """What ``call`` takes as its second argument."""
        return codebook if self.prepare is None else self.prepare(codebook)

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        """Prepare and call."""
        return self.call(x, self.prepared(codebook))
