"""Operator contracts: every schema, every fake, and how a device's own kernels are found.

Each operator has three overloads.  The default one, ``revq::nearest_code``, runs the kernels of its tensors' device: C++
on the CPU, Triton on a GPU, else the reference.  ``revq::nearest_code.triton`` runs the Triton kernels, on CPU tensors
too where Triton's interpreter is on, and ``revq::nearest_code.reference`` the specification on any device.  All stop a
compiler from looking inside, so that nothing fuses the arithmetic of the contract.  Autograd is outside
(``autograd.py``): the operators take and return plain tensors.

Kernels only implement what stands here (``csrc/cpu/register.cpp``, ``triton/operators.py``); they are loaded by the first
call that can use them, so importing this module runs nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revq_kernels import native, reference, triton
from revq_kernels.validation import (
    check_count,
    check_gradient,
    check_index_range,
    check_indices,
    check_metric,
    check_search,
)

SCHEMAS = {
    "nearest_code": "(Tensor x, Tensor codebook) -> Tensor",
    "nearest_by_metric": "(Tensor x, Tensor codebook, Tensor? weight, str metric) -> Tensor",
    "quantize": "(Tensor x, Tensor codebook, Tensor(a!)? count) -> (Tensor, Tensor)",
    "count_codes_": "(Tensor(a!) count, Tensor indices) -> ()",
    "segment_sum": "(Tensor grad, Tensor indices, SymInt num_codes) -> Tensor",
}

INDEX_SCHEMAS = {
    "index_build": "(Tensor codebook) -> (Tensor, Tensor, Tensor, Tensor)",
    "index_refit_": "(Tensor(a!) panels, Tensor ids, Tensor(b!) boxes, Tensor(c!) finite, Tensor codebook) -> ()",
    "index_search": "(Tensor x, Tensor panels, Tensor ids, Tensor boxes, Tensor finite, SymInt num_codes)"
    " -> (Tensor, Tensor)",
}
"""What `CodebookIndex` (``index.py``) is made of; on the CPU alone, and without a reference: `nearest_code` is theirs."""

_library = torch.library.Library("revq", "DEF")


def overload(name: str, variant: str) -> Callable[..., Any]:
    """The operator ``revq::<name>`` as "default", "triton" or "reference"; ``segment_sum`` has an "atomic" one too."""
    return getattr(getattr(torch.ops.revq, name), variant)


def _fake_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def _fake_nearest_by_metric(x: Tensor, codebook: Tensor, weight: Tensor | None, metric: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def _fake_quantize(x: Tensor, codebook: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)


def _fake_count_codes_(count: Tensor, indices: Tensor) -> None:
    return None


def _fake_segment_sum(grad: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return grad.new_empty((grad.shape[-2], num_codes, grad.shape[-1]), dtype=torch.float32)


def _fake_index_search(
    x: Tensor, panels: Tensor, ids: Tensor, boxes: Tensor, finite: Tensor, num_codes: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(3, dtype=torch.int64)


def _check(name: str, arguments: tuple[Any, ...]) -> None:
    """What compiled kernels check too, for calls that do not come through the public functions."""
    if name in ("nearest_code", "nearest_by_metric", "quantize"):
        check_search(*arguments[:2])
    if name == "nearest_by_metric":
        check_metric(arguments[3], arguments[2], arguments[0])
    if name == "quantize" and arguments[2] is not None:
        check_count(arguments[2], arguments[1].shape[0], arguments[1].shape[1], arguments[0])
    if name == "count_codes_":
        check_indices(arguments[1])
        check_count(arguments[0], arguments[1].shape[-1], None, arguments[1])
    if name == "segment_sum":
        check_gradient(*arguments)
        if arguments[0].device.type == "cpu":  # elsewhere reading the indices would stall the device
            check_index_range(arguments[1], arguments[2])


def _checked(name: str, specification: Callable[..., Any]) -> Callable[..., Any]:
    """The specification behind its checks."""

    def run(*arguments: Any) -> Any:
        _check(name, arguments)
        return specification(*arguments)

    return run


def _without_own_kernel(name: str, specification: Callable[..., Any]) -> Callable[..., Any]:
    """What the default overload runs while nothing is registered for a device: find its kernels, else the reference."""

    def run(*arguments: Any) -> Any:
        device_type = arguments[0].device.type
        if device_type == "cpu":
            if not native.is_loaded() and native.load() is None:
                return overload(name, "default")(*arguments)
        elif triton.unavailable(device_type) is None and hasattr(triton.kernels(), name):
            return overload(name, "triton")(*arguments)
        return specification(*arguments)

    return run


def _triton(name: str) -> Callable[..., Any]:
    """The Triton kernels behind the checks."""

    def run(*arguments: Any) -> Any:
        triton.require(arguments[0].device.type)
        _check(name.removesuffix("_atomic"), arguments)
        kernel = getattr(triton.kernels(), name, None)
        if kernel is None:
            raise triton.TritonUnavailableError(f"impl='triton': there is no Triton kernel for {name}")
        if arguments[0].device.type != "cpu":
            return kernel(*arguments)
        with reference.denormals_kept():  # the interpreter computes in the calling thread
            return kernel(*arguments)

    return run


def _define() -> None:
    fakes = {
        "nearest_code": _fake_nearest_code,
        "nearest_by_metric": _fake_nearest_by_metric,
        "quantize": _fake_quantize,
        "count_codes_": _fake_count_codes_,
        "segment_sum": _fake_segment_sum,
    }
    for name, schema in SCHEMAS.items():
        specification = _checked(name, getattr(reference, name))
        kernels = {"": _without_own_kernel(name, specification), ".triton": _triton(name), ".reference": specification}
        if name == "segment_sum":
            kernels[".atomic"] = _triton("segment_sum_atomic")
        for suffix, kernel in kernels.items():
            _library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            _library.impl(f"{name}{suffix}", kernel, "CompositeExplicitAutograd")
            torch.library.register_fake(f"revq::{name}{suffix}", fakes[name], lib=_library)
    _library.define("cpu_isa() -> int", tags=(torch.Tag.pt2_compliant_tag,))
    for name, schema in INDEX_SCHEMAS.items():
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake("revq::index_search", _fake_index_search, lib=_library)


_define()
