"""`patch`, `unpatch` and `like`: fused search for the quantizers in a model that was written without it."""

import copy
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from revq_kernels.interop.doubles import plain_copy
from revq_kernels.interop.family import Family, changed, fast_class
from revq_kernels.interop.registry import LEFT_ALONE, families_of
from revq_kernels.interop.verify import difference

_ALREADY = "already patched"
_LOOKS_LIKE_ONE = re.compile(r"quanti[sz]|codebook", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One module of a report: its name in the model, its class, its family if it has one, and what became of it."""

    module: str
    kind: str
    family: str
    patched: bool
    note: str


@dataclass
class Patched:
    """What `patch` did; prints as a table.  As a context manager it takes the patch back at the end of the block.

    Attributes:
        model: the model that was patched.
        entries: one for each quantizer that was found.
    """

    model: nn.Module
    entries: list[Entry] = field(default_factory=list)
    _changed: list[nn.Module] = field(default_factory=list, repr=False)

    def unpatch(self) -> None:
        """Take back what this call of `patch` did, and no more."""
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
    """Give every known quantizer in ``model`` the fused search, in place.

    A quantizer is known by its class and by what it holds; docs/drop-in.md lists the families.  The smallest method that
    suffices is replaced, by changing the module's class to a subclass of its own: parameters, buffers, names, hooks,
    optimizers and ``isinstance`` stay as they are.  Copies of a patched module are patched.  Patch before
    ``torch.compile`` and before wrappers that set methods on instances (accelerate's hooks); what cannot be patched is
    left as it is, and the report says why.

    Args:
        model: any module, itself a quantizer or holding some.
        verify: run each replacement beside the original on a small random batch, in both modes and with gradients, on
            copies (whose hooks run, too), and leave the original where they differ (see `revq_kernels.interop.verify.difference`).
        verbose: print the report.

    Returns:
        The report; ``with revq.patch(model):`` takes the patch back at the end.

    Raises:
        TypeError: if ``model`` is no module.
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
    """Give every patched quantizer in ``model`` its own class back; nothing else was changed by `patch`.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        _restore(module)


def like(module: nn.Module, *, verify: bool = True) -> nn.Module:
    """A quantizer that computes what ``module`` does, with the fused search, from the same parameters and buffers.

    ``model.quantize = revq.like(model.quantize)`` is all: call, results, ``state_dict`` and parameter names are those of
    ``module``, which itself stays as it is.  Parameters and buffers are the same objects, so optimizers, averaged copies
    and wrappers that hold them go on working.  Go on with one of the two: what is moved, cast or trained as the other
    parts with some of the shared tensors.

    Args:
        module: a quantizer of a known family, or a module that holds some.
        verify: as for `patch`.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if it holds no quantizer that can be replaced, with the reason.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    twin = _twin(module, {})
    report = patch(twin, verify=verify, verbose=False)
    if not any(entry.patched for entry in report.entries):
        raise ValueError(f"module: expected a quantizer of a known family, got {type(module).__name__}\n{report}")
    return twin


def _restore(module: nn.Module) -> None:
    original = vars(type(module)).get("revq_original")
    if original is not None:
        module.__class__ = original


def _patch_one(name: str, module: nn.Module, verify: bool) -> Entry | None:
    """Patch one module by the first family that fits; None for one that is no quantizer."""
    kind = type(module)
    if "revq_original" in vars(kind):
        return Entry(name, kind.__name__, kind.revq_family.name, True, _ALREADY)
    families = families_of(module)
    if not families:
        reason = _left_alone(module)
        return None if reason is None else Entry(name, kind.__name__, "", False, reason)
    reasons = []
    for family in families:
        reason = changed(module, family) or (_check(module, family) if verify else None)
        if reason is None:
            module.__class__ = fast_class(kind, family)
            note = ", ".join(family.replaced) + ("; checked" if verify else "; not checked")
            return Entry(name, kind.__name__, family.name, True, note)
        reasons.append(reason if len(families) == 1 else f"no {family.name}: {reason}")
    if any(families_of(part) for part in module.modules() if part is not module):
        return None  # it shares a name with a quantizer and holds others, which speak for themselves
    return Entry(name, kind.__name__, families[0].name if len(families) == 1 else "", False, "; ".join(reasons))


def _check(module: nn.Module, family: Family) -> str | None:
    """Why the replacement is not to be trusted; None if it is."""
    try:
        with torch.inference_mode(False):  # copies made in that mode take no gradient
            fast = plain_copy(module)
            fast.__class__ = fast_class(type(module), family)
            return difference(module, fast, family.calls)
    except Exception as error:  # whatever goes wrong in a check, the original stays
        return f"the check failed: {type(error).__name__}: {error}"


def _left_alone(module: nn.Module) -> str | None:
    """Why a module that looks like a quantizer is not patched; None for every other."""
    kind = type(module).__name__
    if kind in LEFT_ALONE:
        return LEFT_ALONE[kind]
    holds_own = bool(
        module._parameters or module._buffers or any(isinstance(m, nn.Embedding) for m in module.children())
    )
    if _LOOKS_LIKE_ONE.search(kind) and holds_own and not any(families_of(part) for part in module.modules()):
        return "unknown class"
    return None


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A module tree of its own around the same parameters and buffers."""
    if id(module) not in made:
        twin = made[id(module)] = module.__new__(type(module))
        twin.__dict__.update(vars(module))
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            twin.__dict__[name] = copy.copy(vars(module)[name])
        for name in [key for key in vars(module) if key.endswith("_hooks") and isinstance(vars(module)[key], dict)]:
            twin.__dict__[name] = copy.copy(vars(module)[name])
        twin.__dict__["_modules"] = {
            name: None if part is None else _twin(part, made) for name, part in module._modules.items()
        }
    return made[id(module)]
