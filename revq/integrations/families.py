"""The families that `revq.patch` knows, and the quantizers that it knows and leaves."""

from torch import nn

from revq.integrations import embedding_quantizers, lucidrains, lucidrains_simvq
from revq.integrations.family import Family

FAMILIES: tuple[Family, ...] = (
    *embedding_quantizers.FAMILIES,
    *lucidrains.FAMILIES,
    *lucidrains_simvq.FAMILIES,
)

LEFT_ALONE = {
    "LFQ": "no search: the code is the signs of the input",
    "FSQ": "no search: the code is the rounded input",
    "LatentQuantize": "no search: each number is rounded to one of its few levels",
    "IndexPropagationQuantize": "its gradient needs the softmax over all codes",
}
"""Class name -> why it stays as it is."""


def families_of(module: nn.Module) -> list[Family]:
    """The families that know a module's class by its name: one for a package's class, several for a common name."""
    return [family for family in FAMILIES if family.knows(type(module))]


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        KeyError: if there is none (a pickle of another version).
    """
    return {family.name: family for family in FAMILIES}[name]
