"""Builders that the tests of revq.fast_distances share."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import revq


def operands(shape_x=(70, 5), shape_c=(90, 5), dtype=torch.float32):
    x, c = torch.randn(shape_x).to(dtype), torch.randn(shape_c).to(dtype)
    return x.requires_grad_(), c.requires_grad_()


def lazy(x, c, **kwargs):
    with revq.fast_distances():
        d = torch.cdist(x, c, **kwargs)
    assert type(d) is not torch.Tensor and d.is_lazy
    return d


class LargestResult(TorchDispatchMode):
    """Records the bytes of the largest storage that an operator returned, as a view or new."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.nbytes = max(self.nbytes, part.untyped_storage().nbytes())
        return result


class Doubled(torch.autograd.Function):
    """A function whose input reaches autograd before any ``__torch_function__``."""

    @staticmethod
    def forward(ctx, d):
        return d * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2
