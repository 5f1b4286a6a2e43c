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
        name: its name in the rows of results and in the tables.
        tuning: how it is configured and why.
        call: the search.  Takes x ``[N, G, d]`` and, as second argument, the codebook ``[G, K, d]`` or, if there is a
            ``prepare``, its result; returns indices ``[N, G]``.
        prepare: work done once per codebook, timed separately; None if there is none.
        needs: the module it imports, None if torch is enough.
        runs_on: device types.
        capturable: whether the benchmark tries to capture it as a CUDA graph.
        max_code_dim: the largest d for which it is measured, None for any.
        ours: whether it belongs to this library.  If so, its indices are checked before it is timed, and a wrong one
            ends the benchmark.
        describe: takes the arguments of ``call`` and names the kernel that runs for them; None to name no kernel.
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
        """Why its module cannot be imported here; "" if it can.  Says nothing about devices (``runs_on``)."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"not installed: {self.needs}"
        return ""

    def prepared(self, codebook: Tensor) -> Any:
        """The second argument of ``call``."""
        return codebook if self.prepare is None else self.prepare(codebook)

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        """Prepare and call."""
        return self.call(x, self.prepared(codebook))
