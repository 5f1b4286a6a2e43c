"""The operators ``torch.ops.revq.*``: one table, a row for each, and how a backend implements one.

An operator with a reference has three overloads.  The default one, ``revq::nearest_code``, runs the kernels of its
tensors' device: C++ on the CPU, Triton on a GPU, else the reference.  ``revq::nearest_code.triton`` runs the Triton
kernels, on CPU tensors too if Triton's interpreter is switched on.  ``revq::nearest_code.reference`` runs the
specification on any device.  A compiler sees each overload as opaque, so nothing fuses the arithmetic of the contract.
The operators take and return plain tensors; autograd is outside (``autograd.py``).

A backend registers by name: the C++ library with ``m.impl("nearest_code", ...)`` for the CPU (csrc/cpu/register.cpp),
Triton with an entry in ``KERNELS`` (triton/operators.py).  The first call that can use a backend loads it, so importing
this module loads no kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revq_kernels import native, reference, triton
from revq_kernels.validation import (
    check_count,
    check_index_range,
    check_indices,
    check_metric,
    check_search,
    check_segments,
)


def _check_nothing(*_: Any) -> None:
    """The check of the operators that only `CodebookIndex` calls: their C++ checks all arguments."""


class Operator(NamedTuple):
    """One row of the table; all functions take the operator's own arguments."""

    schema: str
    fake: Callable[..., Any] | None = None
    """Makes outputs of the right shape and dtype without data, for compilers."""
    check: Callable[..., None] = _check_nothing
    """Raises for arguments that do not fit.  The C++ kernels make the same checks themselves."""
    reference: Callable[..., Any] | None = None
    """The specification (``reference.py``).  None: a part of `CodebookIndex`, in C++ only."""


def _fake_indices(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def _fake_quantize(x: Tensor, codebook: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_indices(x)


def _fake_count_codes_(count: Tensor, indices: Tensor) -> None:
    return None


def _fake_segment_sum(values: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return values.new_empty((values.shape[-2], num_codes, values.shape[-1]), dtype=torch.float32)


def _fake_index_search(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_indices(x), x.new_empty(3, dtype=torch.int64)


def _check_by_metric(x: Tensor, codebook: Tensor, weight: Tensor | None, metric: str) -> None:
    check_search(x, codebook)
    if metric == "l2":
        raise ValueError("metric: expected 'inner_product' or 'diagonal', as nearest_code searches by 'l2', got 'l2'")
    check_metric(metric, weight, x)


def _check_quantize(x: Tensor, codebook: Tensor, count: Tensor | None) -> None:
    check_search(x, codebook)
    if count is not None:
        check_count(count, codebook.shape[0], codebook.shape[1], x)


def _check_count_codes_(count: Tensor, indices: Tensor) -> None:
    check_indices(indices)
    check_count(count, indices.shape[-1], None, indices)


def _check_segment_sum(values: Tensor, indices: Tensor, num_codes: int) -> None:
    check_segments(values, indices, num_codes)
    if values.device.type == "cpu":  # on another device, reading the indices would wait for it
        check_index_range(indices, num_codes)


OPERATORS = {
    "nearest_code": Operator(
        "(Tensor x, Tensor codebook) -> Tensor", _fake_indices, check_search, reference.nearest_code
    ),
    "nearest_by_metric": Operator(
        "(Tensor x, Tensor codebook, Tensor? weight, str metric) -> Tensor",
        _fake_indices,
        _check_by_metric,
        reference.nearest_by_metric,
    ),
    "quantize": Operator(
        "(Tensor x, Tensor codebook, Tensor(a!)? count) -> (Tensor, Tensor)",
        _fake_quantize,
        _check_quantize,
        reference.quantize,
    ),
    "count_codes_": Operator(
        "(Tensor(a!) count, Tensor indices) -> ()", _fake_count_codes_, _check_count_codes_, reference.count_codes_
    ),
    "segment_sum": Operator(
        "(Tensor values, Tensor indices, SymInt num_codes) -> Tensor",
        _fake_segment_sum,
        _check_segment_sum,
        reference.segment_sum,
    ),
    "index_build": Operator("(Tensor codebook) -> (Tensor, Tensor, Tensor, Tensor)"),
    "index_refit_": Operator(
        "(Tensor(a!) panels, Tensor ids, Tensor(b!) boxes, Tensor(c!) finite, Tensor codebook) -> ()"
    ),
    "index_search": Operator(
        "(Tensor x, Tensor panels, Tensor ids, Tensor boxes, Tensor finite, SymInt num_codes) -> (Tensor, Tensor)",
        _fake_index_search,
    ),
    "cpu_isa": Operator("() -> int"),
}

_library = torch.library.Library("revq", "DEF")


def _define(name: str, row: Operator, implementation: Callable[..., Any] | None) -> None:
    """Define ``revq::<name>``, where name may end in an overload, and register what runs on a device without a kernel."""
    _library.define(name + row.schema, tags=(torch.Tag.pt2_compliant_tag,))
    if implementation is not None:
        _library.impl(name, implementation, "CompositeExplicitAutograd")
    if row.fake is not None:
        torch.library.register_fake(f"revq::{name}", _on_one_device(name, row.fake), lib=_library)


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake`` behind a check of the devices.

    One tensor on the meta device is enough to call a fake, whose outputs would then be uninitialized memory of the first
    tensor's device.
    """

    def run(*arguments: Any) -> Any:
        devices = sorted({str(argument.device) for argument in arguments if isinstance(argument, Tensor)})
        if len(devices) > 1:
            raise ValueError(f"revq::{name}: expected all tensors on one device, got {' and '.join(devices)}")
        return fake(*arguments)

    return run


def _reference(check: Callable[..., None], specification: Callable[..., Any]) -> Callable[..., Any]:
    """The overload "reference": the specification behind the operator's checks."""

    def run(*arguments: Any) -> Any:
        check(*arguments)
        return specification(*arguments)

    return run


def _triton(name: str, row: Operator, overload: str) -> Callable[..., Any]:
    """The overload ``overload`` of an operator: the Triton kernel of that name behind the operator's checks."""
    kernel_name = name if overload == "triton" else f"{name}_{overload}"

    def run(*arguments: Any) -> Any:
        device_type = arguments[0].device.type
        triton.require(device_type)
        row.check(*arguments)
        kernel = triton.kernels().KERNELS.get(kernel_name)
        if kernel is None:
            raise triton.TritonUnavailableError(f"impl='triton': there is no Triton kernel for {kernel_name}")
        if device_type != "cpu":
            return kernel(*arguments)
        with reference.denormals_kept():  # the interpreter computes in the calling thread
            return kernel(*arguments)

    return run


WITHOUT_FLOAT64 = frozenset({"mps"})
"""Device types without float64, which has no kernels here and may lack what the reference needs: the CPU computes."""


def on_cpu(operator: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call an operator with the arguments on the CPU; the results, and what it mutates, are on the first one's device."""
    device = arguments[0].device
    moved = [value.cpu() if isinstance(value, Tensor) else value for value in arguments]
    results = operator(*moved)
    for declared, given, own in zip(operator._schema.arguments, arguments, moved, strict=True):  # type: ignore[attr-defined]
        if isinstance(given, Tensor) and declared.alias_info is not None:
            given.copy_(own)
    if isinstance(results, tuple):
        return tuple(result.to(device) for result in results)
    return None if results is None else results.to(device)


def _default(name: str, row: Operator) -> Callable[..., Any]:
    """The default overload on a device for which no kernel is registered (yet): load its kernels, else the reference."""

    def run(*arguments: Any) -> Any:
        device_type = arguments[0].device.type
        if device_type in WITHOUT_FLOAT64:
            return on_cpu(getattr(torch.ops.revq, name).default, arguments)
        if device_type == "cpu":
            if not native.is_loaded() and native.load() is None:
                return getattr(torch.ops.revq, name).default(*arguments)  # the C++ kernel, if there is one
        elif triton.unavailable(device_type) is None and name in triton.kernels().KERNELS:
            return getattr(torch.ops.revq, name).triton(*arguments)
        return getattr(torch.ops.revq, name).reference(*arguments)

    return run


def _atomic(name: str, row: Operator) -> Callable[..., Any]:
    """The overload "atomic": Triton's kernel with atomic additions where it can run, else the default overload."""
    kernel = _triton(name, row, "atomic")

    def run(*arguments: Any) -> Any:
        if triton.unavailable(arguments[0].device.type) is None:
            return kernel(*arguments)
        return getattr(torch.ops.revq, name).default(*arguments)

    return run


for _name, _row in OPERATORS.items():
    if _row.reference is None:
        _define(_name, _row, None)
        continue
    _define(_name, _row, _default(_name, _row))
    _define(f"{_name}.triton", _row, _triton(_name, _row, "triton"))
    _define(f"{_name}.reference", _row, _reference(_row.check, _row.reference))
_define("segment_sum.atomic", OPERATORS["segment_sum"], _atomic("segment_sum", OPERATORS["segment_sum"]))
