"""The families that `revq.patch` knows, the quantizers that it leaves alone, and the classes of patched modules."""

import functools
from typing import Any

from torch import nn

from revq_kernels.interop.families import audio, autoregressive, embedding, lucidrains
from revq_kernels.interop.families.family import Family

FAMILIES: tuple[Family, ...] = (
    *embedding.FAMILIES,
    *autoregressive.FAMILIES,
    *lucidrains.FAMILIES,
    *audio.FAMILIES,
)

LEFT_ALONE = {
    "LFQ": "no search: the code is the signs of the input",
    "FSQ": "no search: the code is the rounded input",
    "LatentQuantize": "no search: each number is rounded to one of its few levels",
    "IndexPropagationQuantize": "its gradient needs the softmax over all codes",
    "GumbelQuantize": "no search: it samples from the softmax over all codes",
    "VectorQuantizerSinkhorn": "it assigns by Sinkhorn iterations over the whole matrix, in evaluation mode, too",
}
"""Class name -> why `revq.patch` does not replace it."""


def families_of(module: nn.Module) -> list[Family]:
    """The families of a module's class: those that list its path, else those that list its name, which several may do."""
    path = f"{type(module).__module__}.{type(module).__qualname__}"
    by_path = [family for family in FAMILIES if path in family.classes]
    return by_path or [family for family in FAMILIES if family.includes(type(module))]


@functools.cache
def fast_class(original: Any, family: Family) -> Any:
    """The class of a patched module: the family's methods, then ``original``, under the name of ``original``."""

    def reduce(self: nn.Module, protocol: int) -> tuple:
        reduced = super(kind, self).__reduce_ex__(protocol)
        return (new_patched, (original, family.name), *reduced[2:])  # so copies and pickles are patched too

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own = {"revq_original": original, "revq_family": family, "__reduce_ex__": reduce}
    kind: Any = type(original.__name__, (family.methods, original), {**names, **own})
    return kind


def new_patched(original: Any, family_name: str) -> nn.Module:
    """An empty patched module, which copy and pickle fill.  Pickles name this function: it must not move.

    Raises:
        KeyError: if no family has that name (a pickle of another version).
    """
    kind = fast_class(original, {family.name: family for family in FAMILIES}[family_name])
    return kind.__new__(kind)
