"""A kernel launch as data: what a search runs can be looked at, or compiled for another card, before it runs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """``kernel[grid](*arguments, **constants)``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    fp_fusion: bool
    """Whether the compiler may fuse a product into a sum; never in what computes D."""

    def run(self) -> None:
        """Launch the kernel on the current stream of its tensors' device."""
        first = next(argument for argument in self.arguments if isinstance(argument, Tensor))
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": self.fp_fusion}
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                self.kernel[self.grid](*self.arguments, **self.constants, **options)
        else:
            self.kernel[self.grid](*self.arguments, **self.constants, **options)
