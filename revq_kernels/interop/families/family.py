"""The description of a family of quantizers: its classes, the methods that replace theirs, and the calls that check them."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Quantizer = Any
"""A module of another library: an `nn.Module` whose attributes only that library declares."""


@dataclass(frozen=True)
class Call:
    """One call of a module's method, for a check: ``getattr(module, method)(*args, **kwargs)``."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of quantizers that one set of methods serves.

    Attributes:
        name: the name that the report shows.
        classes: dotted paths, ``package.module.Class``, of the classes in the family; ``*.Class`` is a class of that name in
            any module (research repositories are not installable packages, so their files are copied between projects).
        methods: a class whose functions replace those of the same name in the quantizer's class, with the same parameters.
            It precedes the quantizer's class in the method resolution order; ``self.revq_original`` is that class.
        unsupported: given a module of one of the classes, the reason to keep the original; None if the methods serve it.
        calls: given a module and a source of random vectors, the calls that check the replacement on it.
        started: the name of the buffer that says whether k-means has initialized the codebook, "" without k-means.
    """

    name: str
    classes: tuple[str, ...]
    methods: type
    unsupported: Callable[[nn.Module], str | None]
    calls: Callable[[nn.Module, "Vectors"], list[Call]]
    started: str = ""

    def includes(self, kind: type) -> bool:
        """Whether a class belongs to the family."""
        return f"{kind.__module__}.{kind.__qualname__}" in self.classes or f"*.{kind.__name__}" in self.classes

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the methods that are replaced; functions with a leading underscore are helpers of those."""
        own = vars(self.methods).items()
        return tuple(name for name, value in own if inspect.isfunction(value) and not name.startswith("_"))

    def mismatch(self, module: nn.Module) -> str | None:
        """Why a module of one of the classes differs from what the methods were written for; None if it does not."""
        for name in self.replaced:
            original = getattr(type(module), name, None)
            if original is None:
                return f"its class has no method {name!r}"
            if name in vars(module):
                return f"{name!r} is set on the instance (by a hook or another patch), and would hide the replacement"
            expected, found = parameter_names(getattr(self.methods, name))[1:], parameter_names(original)[1:]
            if expected != found:
                return f"{name!r} takes ({', '.join(found)}); known is ({', '.join(expected)})"
        try:
            return self.unsupported(module)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            return f"it does not hold what is expected: {error}"


class Vectors:
    """A source of random vectors with the statistics, device and dtype of a codebook; every instance draws the same ones."""

    def __init__(self, seed: int = 0, batch: int = 2) -> None:
        self.batch = batch
        """The size of a batch that calls should ask for."""
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, codebook: Tensor, *shape: int) -> Tensor:
        """Normally distributed vectors of ``shape``, with the mean and standard deviation of all elements of ``codebook``."""
        codebook = codebook.detach()
        mean, deviation = codebook.double().mean(), codebook.double().std()
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        noise = torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu").to(codebook.device)
        return (noise * deviation + mean).to(codebook.dtype)


def parameter_names(function: Callable) -> list[str]:
    """The names of a function's parameters, in order."""
    return list(inspect.signature(function).parameters)


def source_of(module: Quantizer) -> Any:
    """The Python module that defines the class of a quantizer, patched or not, for look-ups of its library's own functions."""
    return sys.modules.get(type(module).__module__)
