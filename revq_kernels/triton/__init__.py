"""GPU kernels in Triton.  Importing this package imports no Triton and touches no device.

`unavailable` says whether the kernels can run; `kernels` imports them with the first call that needs them.
"""

import importlib
import importlib.util
import os
from types import ModuleType

INTERPRETED = "TRITON_INTERPRET"


class TritonUnavailableError(RuntimeError):
    """``impl="triton"`` was asked for by name and the kernels cannot run."""


def interpreted() -> bool:
    """Whether Triton's interpreter is on; it runs the kernels on CPU tensors, slowly."""
    return os.environ.get(INTERPRETED) == "1"


def unavailable(device_type: str) -> str | None:
    """None, or the reason why the kernels cannot run on tensors of this device type."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install 'triton>=3.4'`"
    if device_type == "cpu" and not interpreted():
        return f"they run CUDA tensors, got a tensor on cpu; set {INTERPRETED}=1 to interpret them there, slowly"
    if device_type not in ("cpu", "cuda"):
        return f"they run CUDA tensors, got a tensor on {device_type}"
    return None


def require(device_type: str) -> bool:
    """True, so that a compiler can treat the result as a constant.

    Raises:
        TritonUnavailableError: if the kernels cannot run, with the reason.
    """
    reason = unavailable(device_type)
    if reason is not None:
        raise TritonUnavailableError(f"impl='triton' cannot run its kernels: {reason}")
    return True


# The attribute that torch.compiler.assume_constant_result sets: calling that would import the compiler, and Triton.
require._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels() -> ModuleType:
    """The module with the operators' implementations (`operators.KERNELS`); imports Triton."""
    return importlib.import_module("revq_kernels.triton.operators")
