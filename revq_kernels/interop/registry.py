"""The families that `revq.patch` knows, and the quantizers that it knows and leaves."""

from torch import nn

from revq_kernels.interop.families import (
    audio,
    direction,
    embedding,
    llamagen,
    lucidrains,
    lucidrains_simvq,
    taming,
    titok,
    unitok,
    var,
)
from revq_kernels.interop.family import Family

FAMILIES: tuple[Family, ...] = (
    *embedding.FAMILIES,
    *taming.FAMILIES,
    *titok.FAMILIES,
    *llamagen.FAMILIES,
    *unitok.FAMILIES,
    *var.FAMILIES,
    *lucidrains.FAMILIES,
    *lucidrains_simvq.FAMILIES,
    *audio.FAMILIES,
    *direction.FAMILIES,
)

LEFT_ALONE = {
    "LFQ": "no search: the code is the signs of the input",
    "FSQ": "no search: the code is the rounded input",
    "LatentQuantize": "no search: each number is rounded to one of its few levels",
    "IndexPropagationQuantize": "its gradient needs the softmax over all codes",
    "GumbelQuantize": "no search: it samples from the softmax over all codes",
    "VectorQuantizerSinkhorn": "it assigns by Sinkhorn iterations over the whole matrix, in evaluation mode, too",
}
"""Class name -> why it stays as it is."""


def families_of(module: nn.Module) -> list[Family]:
    """The families that know a module's class: by its path, else by its name, which several may share."""
    path = f"{type(module).__module__}.{type(module).__qualname__}"
    by_path = [family for family in FAMILIES if path in family.classes]
    return by_path or [family for family in FAMILIES if family.knows(type(module))]


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        KeyError: if there is none (a pickle of another version).
    """
    return {family.name: family for family in FAMILIES}[name]
