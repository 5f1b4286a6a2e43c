"""Runs a module in float64 as it stands, also where its code converts to float32."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in which neither buffers nor computed attributes (the weight of ``weight_norm``) take gradients.

    torch does not copy a computed tensor, and a buffer that takes a gradient cannot be changed in place.
    """
    attributes = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    graded = [tensor for tensor in module.buffers() if tensor.requires_grad]
    graded += [tensor for tensor in attributes if not tensor.is_leaf]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in graded})


def in_double(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with float64 parameters and buffers; call it inside `Doubles`."""
    twin = plain_copy(module).double()
    for part in twin.modules():  # tensors that are neither parameters nor buffers, such as a cached codebook
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.dtype in _NARROW:
                setattr(part, name, value.double())
    return twin


def doubled(values: Any) -> Any:
    """``values`` (tensors in tuples, lists and dicts) with float64 in the place of narrower floats, as new leaves."""

    def double(tensor: Tensor) -> Tensor:
        if tensor.dtype not in _NARROW:
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, double, values)


class Doubles(TorchFunctionMode):
    """Within the block, conversions to narrower floats convert to float64, which is the default dtype."""

    def __enter__(self) -> "Doubles":
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args = tuple(_wide(value) for value in args)
        return func(*args, **{name: _wide(value) for name, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
