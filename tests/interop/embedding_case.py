"""Builders and checks that the tests of quantizers around ``embedding.weight`` share."""

import copy

import torch
from drop_in_case import Call, graph_breaks, patched
from torch import nn

import revq

CODES, DIM, PIXELS = 512, 8, 64


def trained(module: nn.Module) -> nn.Module:
    """The module with normally distributed codes: a fresh table is so close to zero that all its codes are about as near."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.embedding.weight.copy_(torch.randn(module.embedding.weight.shape, generator=generator))
    return module


def images(seed: int, dim: int = DIM) -> tuple[torch.Tensor]:
    """``[2, dim, 4, 8]``: 64 vectors."""
    return (torch.randn(2, dim, 4, 8, generator=torch.Generator().manual_seed(seed)),)


def check_compile(module: nn.Module, call: Call) -> None:
    """A patched module adds no graph break, and compiles as one graph if the original does."""
    before = graph_breaks(module, call)
    with patched(module):
        assert graph_breaks(module, call) <= before
        if before == 0:
            torch.compile(getattr(module, call.method), fullgraph=True, backend="eager")(*call.args, **call.kwargs)


def note_of(module: nn.Module) -> str:
    """The note in the report for a quantizer that `patch` leaves alone."""
    (entry,) = revq.patch(copy.deepcopy(module), verbose=False).entries
    assert not entry.patched, entry
    return entry.note


def as_if(original: type, **changes: object) -> type:
    """A class like a newer version of ``original``: the same module and name, other contents."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), {**names, **changes})
