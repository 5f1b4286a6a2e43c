"""The compiled CPU library: found beside this file, loaded once, by the first call that can use it."""

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")
ISA_NAMES = ("baseline", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)", "x86-64-v4 (AVX-512, VNNI)")

_loaded = False
_failure: str | None = None


class NativeUnavailableError(RuntimeError):
    """``impl="native"`` was asked for by name and the compiled library cannot be loaded."""


def is_loaded() -> bool:
    """Whether the kernels are registered."""
    return _loaded


def load() -> str | None:
    """Load the library on the first call; returns None, or the reason why there is none."""
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


# What torch.compiler.assume_constant_result sets; that function imports the compiler, and with it Triton.
require._dynamo_marked_constant = True  # type: ignore[attr-defined]


def isa() -> str:
    """Name of the instruction set whose clone of the kernels runs on this machine (after `load`)."""
    return ISA_NAMES[torch.ops.revq.cpu_isa()]
