"""What a call returns and leaves behind besides numbers in tensors: structure, plain values, attributes, globals, random state."""

import contextlib
import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_OF_MODULES = ("_parameters", "_buffers", "_modules")
_LIMIT = 10_000  # entries of a container of a module of Python that are compared; longer ones are tables, not counters


def leaves(value: Any, name: str, inside: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Path and value of every leaf in nested containers and objects: tensors, plain values, and a text for each structure."""
    if isinstance(value, Tensor | float) and not isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, _PLAIN):
        yield name, f"{type(value).__name__} {value!r}"
    elif id(value) not in inside:
        yield from _parts(value, name, inside | {id(value)})


def _parts(value: Any, name: str, inside: frozenset[int]) -> Iterator[tuple[str, Any]]:
    kind = type(value).__name__
    if isinstance(value, dict):
        yield name, f"{kind} of {[*map(str, value)]}"
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}", inside)
    elif isinstance(value, set | frozenset):
        yield name, f"{kind} of {sorted(map(str, value))}"
    elif isinstance(value, list | tuple | deque):
        yield name, f"{kind} of length {len(value)}"
        for position, item in enumerate(value):
            yield from leaves(item, f"{name}[{position}]", inside)
    elif callable(value) or isinstance(value, nn.Module):
        yield name, f"{kind} {getattr(value, '__qualname__', '')}"
    else:
        yield name, kind
        for key, item in getattr(value, "__dict__", {}).items():
            yield from leaves(item, f"{name}.{key}", inside)


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The leaves of what a module and its parts hold, other than parameters and buffers."""
    for path, part in module.named_modules():
        for key, value in vars(part).items():
            if key not in _OF_MODULES:
                yield from leaves(value, f"{path}.{key}".lstrip("."))


def described(value: Any) -> Any:
    """A leaf as a fact that has to be equal; a Python float stays the number, which may have a rounding error."""
    if not isinstance(value, Tensor):
        return value
    grad = ", requires grad" if value.requires_grad else ""
    return f"{value.dtype} {tuple(value.shape)} on {value.device}{grad}"


def named_codes(kind: type) -> dict[str, Any]:
    """The functions that a class and its bases define by name, without those of torch; the first in the order of look-up."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base is not object and not base.__module__.startswith("torch."):
            for name, value in vars(base).items():
                found.setdefault(name, value)
    return {name: function for name, value in found.items() if (function := function_of(value)) is not None}


def function_of(value: Any) -> Any:
    """The Python function inside a method, property, static method or decorator; None without one."""
    value = getattr(value, "fget", value)
    value = getattr(value, "__func__", value)
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value if isinstance(getattr(value, "__code__", None), CodeType) else None


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A code object and those of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


@contextlib.contextmanager
def kept_surroundings(module: nn.Module) -> Iterator[Callable[[], dict[str, Any]]]:
    """Restores what a call changes outside of the module, and tells it: variables of Python modules and classes, random state.

    Variables are those that the methods of the module and its parts name, with plain values or containers.
    """
    owners: dict[tuple[int, str], tuple[Any, str, Any, dict]] = {}
    for kind in {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}:
        for owner, name, value in _variables(kind):
            owners.setdefault((id(owner), name), (owner, name, copy.copy(value), dict(leaves(value, name))))
    originals = {key: vars(owner)[name] for key, (owner, name, *_) in owners.items()}
    state = random.getstate()

    def changes() -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for owner, name, _, before in owners.values():
            after = dict(leaves(vars(owner).get(name), name))
            if not _same(after, before):
                changed |= {f"{owner.__name__}.{path}": described(leaf) for path, leaf in after.items()}
        changed["the state of torch's random numbers"] = hash(bytes(torch.default_generator.get_state().tolist()))
        changed["the state of Python's random numbers"] = hash(random.getstate())
        return changed

    try:
        yield changes
    finally:
        random.setstate(state)
        for key, (owner, name, value, before) in owners.items():
            if not _same(dict(leaves(vars(owner).get(name), name)), before):
                setattr(owner, name, _refilled(originals[key], value))


def _variables(kind: Any) -> Iterator[tuple[Any, str, Any]]:
    names: set[str] = set()
    source = sys.modules.get(kind.__module__)
    functions = list(named_codes(kind).values())
    for function in functions:
        for code in codes_in(function.__code__):
            new = {name for name in code.co_names if name not in names}
            names |= new
            functions += [f for name in new if (f := function_of(function.__globals__.get(name))) is not None
                          and f.__module__ == kind.__module__]  # fmt: skip
    classes = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.")]
    for owner in [source, *classes]:
        for name, value in list(vars(owner).items()) if owner is not None else ():
            plain = isinstance(value, _PLAIN) or (isinstance(value, _CONTAINERS) and len(value) <= _LIMIT)
            if name in names and plain and not name.startswith("__"):
                yield owner, name, value


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[name] is other[name] if isinstance(one[name], Tensor) else one[name] == other[name] for name in one
    )


def _refilled(container: Any, contents: Any) -> Any:
    """The same container with its former contents, because others may hold it; a plain value as it was."""
    if isinstance(container, dict | set):
        container.clear()
        container.update(contents)
    elif isinstance(container, list | deque):
        container.clear()
        container.extend(contents)
    return container
