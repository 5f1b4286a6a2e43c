"""`patch`, `unpatch` and `like`: replace the search of quantizers in existing models by the fused one."""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from revq_kernels.interop.families.family import Family
from revq_kernels.interop.fingerprints import UNKNOWN, is_known
from revq_kernels.interop.registry import LEFT_ALONE, families_of, fast_class
from revq_kernels.interop.verify import difference, plain_copy

_ALREADY = "already patched"
_UNKNOWN_CLASS = "unknown class; looks like a nearest-code search: try revq.fast_distances()"
_LOOKS_LIKE_ONE = re.compile(r"quanti[sz]|codebook", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One quantizer in a report.

    Attributes:
        module: its name in the model.
        kind: the name of its class.
        family: the name of its family, "" without one.
        patched: whether its search is replaced.
        note: the methods that are replaced, or why none is.
    """

    module: str
    kind: str
    family: str
    patched: bool
    note: str


@dataclass
class Patched:
    """What `patch` did; prints as a table.  As a context manager it undoes the patch at the end of the block.

    Attributes:
        model: the model that was patched.
        entries: one `Entry` per quantizer in the model.
    """

    model: nn.Module
    entries: list[Entry] = field(default_factory=list)
    _changed: list[nn.Module] = field(default_factory=list, repr=False)

    def unpatch(self) -> None:
        """Undo this call of `patch`; modules that were patched before it stay patched."""
        for module in self._changed:
            _restore(module)

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *error: object) -> None:
        self.unpatch()

    def __str__(self) -> str:
        if not self.entries:
            return "revq.patch: no quantizer found"
        rows = [("module", "class", "family", "", "note")]
        rows += [(e.module, e.kind, e.family, "patched" if e.patched else "left", e.note) for e in self.entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def patch(model: nn.Module, *, verify: bool = True, verbose: bool = True) -> Patched:
    """Replace the search of every known quantizer in ``model`` by the fused one, in place.

    A quantizer is recognized by its class and its attributes; docs/drop-in.md lists the families.  The patch replaces the
    smallest method that contains the search, by changing the module's class to a subclass: parameters, buffers, names,
    hooks, optimizers and ``isinstance`` stay as they are.  Copies of a patched module are patched.  Patch before
    ``torch.compile`` and before wrappers that set methods on instances (accelerate's hooks).  A quantizer that cannot be
    patched stays as it is, and the report says why.

    Args:
        model: a quantizer, or a module that contains quantizers.
        verify: run each replacement and the original on a small random batch, in both modes and with gradients, and keep
            the original where they differ (see `revq_kernels.interop.verify.difference`).  The runs use copies, whose hooks
            run too.
        verbose: print the report.

    Returns:
        The report; ``with revq.patch(model):`` undoes the patch at the end.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Patched(model)
    for name, module in list(model.named_modules()):
        entry = _patch_one(name or "(itself)", module, verify)
        if entry is not None:
            report.entries.append(entry)
            if entry.patched and entry.note != _ALREADY:
                report._changed.append(module)
    if verbose:
        print(report)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every patched quantizer in ``model`` its original class back, which undoes all that `patch` changed.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        _restore(module)


def like(module: nn.Module, *, verify: bool = True) -> nn.Module:
    """A patched copy of ``module`` that shares its parameters and buffers; ``module`` itself stays as it is.

    Usage: ``model.quantize = revq.like(model.quantize)``.  Call, results, ``state_dict`` and parameter names are those of
    ``module``.  Parameters and buffers are the same objects, so optimizers, averaged copies and wrappers that hold them keep
    working.  Use only one of the two modules afterwards: moving, casting or training one of them can replace tensors that
    the other one then no longer shares.

    Args:
        module: a quantizer of a known family, or a module that contains some.
        verify: as for `patch`.

    Returns:
        The new module.

    Raises:
        TypeError: if ``module`` is not a module.
        ValueError: if it contains no quantizer that can be patched, with the reason.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    fast = _shallow_copy(module, {})
    report = patch(fast, verify=verify, verbose=False)
    if not any(entry.patched for entry in report.entries):
        raise ValueError(f"module: expected a quantizer of a known family, got {type(module).__name__}\n{report}")
    return fast


def _restore(module: nn.Module) -> None:
    original = vars(type(module)).get("revq_original")
    if original is not None:
        module.__class__ = original


def _patch_one(name: str, module: nn.Module, verify: bool) -> Entry | None:
    """Patch one module by the first family that fits; None for a module that is not a quantizer."""
    kind: Any = type(module)
    if "revq_original" in vars(kind):
        return Entry(name, kind.__name__, kind.revq_family.name, True, _ALREADY)
    families = families_of(module)
    reason = _left_alone(module) if not families else _not_to_be_run(module)
    if reason is not None or not families:
        return None if reason is None else Entry(name, kind.__name__, "", False, reason)
    reasons = []
    for family in families:
        reason = family.mismatch(module) or (_check(module, family) if verify else None)
        if reason is None:
            checked = "checked" if is_known(module, family) else UNKNOWN
            module.__class__ = fast_class(kind, family)
            note = f"{', '.join(family.replaced)}; {checked if verify else 'not checked'}"
            return Entry(name, kind.__name__, family.name, True, note)
        reasons.append(reason if len(families) == 1 else f"no {family.name}: {reason}")
    if any(families_of(part) for part in module.modules() if part is not module):
        return None  # it has the class name of a quantizer but only contains quantizers, which have their own entries
    if len(families) > 1 and not any(_holds_what_is_expected(module, family) for family in families):
        reasons = [_UNKNOWN_CLASS]
    return Entry(name, kind.__name__, families[0].name if len(families) == 1 else "", False, "; ".join(reasons))


def _holds_what_is_expected(module: nn.Module, family: Family) -> bool:
    try:
        family.unsupported(module)
    except (AttributeError, KeyError, IndexError, TypeError):
        return False
    return True


def _not_to_be_run(module: nn.Module) -> str | None:
    """Why no check can run on a module of a known class; None if it can."""
    held = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in held):
        return "its parameters are on the meta device: load its weights first"
    # By name, because importing DTensor takes seconds
    kinds = {type(tensor).__name__ for tensor in held} | {base.__name__ for base in type(module).__mro__}
    if kinds & {"DTensor", "FSDPModule"}:
        return "sharded by FSDP2: patch first"
    return None


def _check(module: nn.Module, family: Family) -> str | None:
    """Why the replacement must not be used; None if it passes the check."""
    try:
        with torch.inference_mode(False):  # tensors copied in inference mode take no gradient
            fast = plain_copy(module)
            kind: Any = type(module)
            fast.__class__ = fast_class(kind, family)
            return difference(module, fast, family)
    except Exception as error:  # any failure of a check keeps the original
        return f"the check failed: {type(error).__name__}: {error}"


def _left_alone(module: nn.Module) -> str | None:
    """Why a module without a family is not patched, if it looks like a quantizer; None if it does not."""
    kind = type(module).__name__
    if kind in LEFT_ALONE:
        return LEFT_ALONE[kind]
    holds_own = bool(
        module._parameters or module._buffers or any(isinstance(m, nn.Embedding) for m in module.children())
    )
    if _LOOKS_LIKE_ONE.search(kind) and holds_own and not any(families_of(part) for part in module.modules()):
        return _not_to_be_run(module) or _UNKNOWN_CLASS
    return None


def _shallow_copy(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """A copy of a tree of modules around the same parameters and buffers; ``copies`` maps ids of originals to copies."""
    if id(module) not in copies:
        copied = copies[id(module)] = module.__new__(type(module))
        copied.__dict__.update(vars(module))
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            copied.__dict__[name] = copy.copy(vars(module)[name])
        for name in [key for key in vars(module) if key.endswith("_hooks") and isinstance(vars(module)[key], dict)]:
            copied.__dict__[name] = copy.copy(vars(module)[name])
        copied.__dict__["_modules"] = {
            name: None if part is None else _shallow_copy(part, copies) for name, part in module._modules.items()
        }
    return copies[id(module)]
