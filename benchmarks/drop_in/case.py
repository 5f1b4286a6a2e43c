"""What a row of the drop-in table needs to know of a quantizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class DropInCase:
    """A quantizer at the table's size, 4,096 vectors against 16,384 codes unless it says otherwise.

    Attributes:
        family: the family's name in `revq_kernels.interop`.
        quantizer: the class, and whose it is; no two cases have the same.
        d: numbers per code.
        build: makes the module, with a codebook of K normal vectors; the package's own class where there is one.
        inputs: the arguments of a call with N vectors, made from a fixed seed.
        method: the method that is timed.
        trains: whether the family trains: the table then also has forward + backward in training mode.
        codes: K.
        vectors: N.
    """

    family: str
    quantizer: str
    d: int
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    method: str = "forward"
    trains: bool = True
    codes: int = 16384
    vectors: int = 4096
