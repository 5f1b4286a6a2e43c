"""The compiled CPU library, which lies beside this file; the first call that can use it loads it, once."""

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")
ISA_NAMES = ("baseline", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)", "x86-64-v4 (AVX-512, VNNI)")

_loaded = False
_failure: str | None = None


class NativeUnavailableError(RuntimeError):
    """``impl="native"`` was requested by name and the compiled library cannot be loaded."""


def is_loaded() -> bool:
    """Whether the kernels are registered."""
    return _loaded


def load() -> str | None:
    """Load the library on the first call; returns None, or the reason why it cannot be loaded."""
    global _loaded, _failure
    if _loaded or _failure is not None:
        return _failure
    if not LIBRARY.is_file():
        _failure = f"{LIBRARY.name} is not built: run `pip install --no-build-isolation -e .` in the checkout"
        return _failure
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        _failure = f"{LIBRARY.name} does not load: {error}"
        return _failure
    _loaded = True
    return None


def require() -> bool:
    """Load the library, or raise.

    Raises:
        NativeUnavailableError: with the reason.
    """
    reason = load()
    if reason is not None:
        raise NativeUnavailableError(f"impl='native' cannot run: {reason}; impl='auto' would use the reference")
    return True


# The attribute that torch.compiler.assume_constant_result sets.  Calling that function would import Triton.
require._dynamo_marked_constant = True  # type: ignore[attr-defined]


def isa() -> str:
    """Name of the instruction set that the kernels use on this machine; call `load` first."""
    return ISA_NAMES[torch.ops.revq.cpu_isa()]
