"""What is known of a family of quantizers: which classes belong to it, and the methods that take the place of theirs."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
        name: as the report shows it.
        classes: dotted paths, ``package.module.Class``, of classes that belong to the family; ``*.Class`` is a class of that
            name wherever it is defined (repositories that are no packages are copied from project to project).
        methods: a class whose functions replace the quantizer's, under their names and with their parameters.  It stands
            before the quantizer's class in the method resolution order, so ``super()`` reaches what it replaces.
        unfit: given a module of one of the classes, why it must stay as it is; None where the methods serve it.
        calls: given a module and a source of random vectors, the calls that check the replacement on it.
    """

    name: str
    classes: tuple[str, ...]
    methods: type
    unfit: Callable[[nn.Module], str | None]
    calls: Callable[[nn.Module, "Vectors"], list[Call]]

    def knows(self, kind: type) -> bool:
        """Whether a class is one of the family's."""
        return f"{kind.__module__}.{kind.__qualname__}" in self.classes or f"*.{kind.__name__}" in self.classes

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the methods that are replaced; functions with a leading underscore only serve them."""
        own = vars(self.methods).items()
        return tuple(name for name, value in own if inspect.isfunction(value) and not name.startswith("_"))


class Vectors:
    """A source of random vectors that look like a codebook's, of its device and dtype; the same ones at every use."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, codebook: Tensor, *shape: int) -> Tensor:
        """Normal numbers of ``shape`` with the mean and standard deviation of the numbers in ``codebook``."""
        codebook = codebook.detach()
        mean, deviation = codebook.double().mean(), codebook.double().std()
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        noise = torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu").to(codebook.device)
        return (noise * deviation + mean).to(codebook.dtype)


def changed(module: nn.Module, family: Family) -> str | None:
    """Why a module of one of the family's classes is not what the methods were written for; None if it is."""
    for name in family.replaced:
        original = getattr(type(module), name, None)
        if original is None:
            return f"its class has no method {name!r}"
        if name in vars(module):
            return f"{name!r} is set on the instance (by a hook or another patch), and would hide the replacement"
        expected, found = _parameters(getattr(family.methods, name)), _parameters(original)
        if expected != found:
            return f"{name!r} takes ({', '.join(found)}); known is ({', '.join(expected)})"
    try:
        return family.unfit(module)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        return f"it does not hold what is expected: {error}"


@functools.cache
def fast_class(original: type, family: Family) -> type:
    """The class of a patched module: the family's methods before ``original``, under the name of ``original``."""

    def reduce(self: nn.Module, protocol: int) -> tuple:
        reduced = super(kind, self).__reduce_ex__(protocol)  # copies and pickles are patched, too
        return (_blank, (original, family.name), *reduced[2:])

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own = {"revq_original": original, "revq_family": family, "__reduce_ex__": reduce}
    kind = type(original.__name__, (family.methods, original), {**names, **own})
    return kind


def _blank(original: type, family_name: str) -> nn.Module:
    """An empty module for copy and pickle to fill."""
    from revq_kernels.interop.registry import family_named

    kind = fast_class(original, family_named(family_name))
    return kind.__new__(kind)


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]
