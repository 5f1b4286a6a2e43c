"""Which implementation runs, and why."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revq_kernels import native, triton
from revq_kernels.ops import WITHOUT_FLOAT64  # the import defines the operators
from revq_kernels.validation import COSINES, check_implementation, check_metric, check_search


class Choice(NamedTuple):
    """The implementation that a call would run, and the reason; prints as one line."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason}"


def operator(
    name: str, impl: str, tensor: Tensor, deterministic: bool = True, *, metric: str = "l2"
) -> Callable[..., Any]:
    """The overload of ``torch.ops.revq.<name>`` that ``impl`` means for ``tensor`` (see ``ops.py``).

    An implementation requested by name runs or raises.  "auto" is the default overload: the kernels of the tensor's
    device, or the reference if the device has none.

    Args:
        name: a row of `revq_kernels.ops.OPERATORS`.
        impl: "auto", "native", "triton" or "reference".
        tensor: an argument of the call; its device decides.
        deterministic: False permits an operator's "atomic" overload on a GPU.
        metric: of a search; metrics other than "l2" have no kernel.

    Raises:
        ValueError: for an unknown ``impl``, or a device or metric that the implementation does not serve.
        NativeUnavailableError: for "native" without the compiled library.
        TritonUnavailableError: for "triton" without Triton, or for CPU tensors without its interpreter.
    """
    check_implementation(impl)
    overloads = getattr(torch.ops.revq, name)
    if impl == "reference":
        return overloads.reference
    if metric != "l2" and impl != "auto":
        raise ValueError(f"impl: metric={metric!r} has no kernel, expected 'auto' or 'reference', got {impl!r}")
    if impl == "native":
        if tensor.device.type != "cpu":
            raise ValueError(f"impl: 'native' runs CPU tensors, got a tensor on {tensor.device}")
        native.require()
    if impl == "triton":
        triton.require(tensor.device.type)
    if not deterministic and (impl == "triton" or tensor.device.type == "cuda"):
        return overloads.atomic
    return overloads.triton if impl == "triton" else overloads.default


def explain(x: Tensor, codebook: Tensor, *, metric: str = "l2", impl: str = "auto") -> Choice:
    """Say which implementation `nearest_code` and `quantize` would run for these arguments, and why.

    Args:
        x: ``[..., G, d]`` as for `nearest_code`.
        codebook: ``[G, K, d]``.
        metric: as for `nearest_code`, or "cosine" or "cosine_lookup" as for `FastChannelVQ`, which are an l2 search of
            normalized vectors.
        impl: as for `nearest_code`.

    Raises:
        ValueError, TypeError, NativeUnavailableError, TritonUnavailableError: as the call itself would.
    """
    check_search(x, codebook)
    if metric in COSINES:
        metric = "l2"
    check_metric(metric, x if metric == "diagonal" else None, x)  # x stands in for a weight, which has its shape
    operator("nearest_code", impl, x, metric=metric)  # raises as the call would
    if impl == "reference":
        return Choice("reference", "requested by name; plain torch")
    where = f"on the CPU, as {x.device.type} has no float64; " if x.device.type in WITHOUT_FLOAT64 else ""
    if metric != "l2":
        return Choice("reference", f"{where}no kernels for metric {metric!r}; plain torch")
    if impl == "triton" or x.device.type == "cuda":
        failure = triton.unavailable(x.device.type)
        if failure is None:
            return Choice("triton", triton.kernels().explain(x, codebook))
        return Choice("reference", f"Triton's kernels cannot run: {failure}; plain torch")
    if x.device.type not in ("cpu", *WITHOUT_FLOAT64):
        return Choice("reference", f"no kernels for device type {x.device.type!r}; plain torch")
    failure = native.load()
    if failure is not None:
        return Choice("reference", f"{where}{failure}; plain torch")
    return Choice("native", f"{where or 'CPU tensors; '}C++ for {native.isa()}, {torch.get_num_threads()} threads")
