"""What a row of the drop-in table needs to know of a quantizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class DropInCase:
    """A quantizer at the table's size: K = 16,384 codes (1,024 and more for audio, where that is what exists), N = 4,096 vectors.

    Attributes:
        family: the family's name in `revq.integrations`.
        quantizer: the class, and whose it is.
        d: numbers per code.
        build: makes the module, with a codebook of K normal vectors; the package's own class where there is one.
        inputs: the arguments of a call with N vectors, made once from a fixed seed.
        method: the method that is timed.
        trains: whether the family trains: the row then also has forward + backward in training mode.
    """

    family: str
    quantizer: str
    d: int
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    method: str = "forward"
    trains: bool = True
