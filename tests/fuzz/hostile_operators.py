"""Calls `torch.ops.revq.*` directly with hostile tensors: `python hostile_operators.py [seed [calls]]`, in its own process.

A call may raise one of `ERRORS`; else its indices are codes.  Anything else ends the process: a signal or an AssertionError.
"""

import random
import sys
from collections import Counter

import torch
from torch import Tensor

import revq_kernels
from revq_kernels.ops import OPERATORS

ERRORS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, MemoryError)
DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint8,
)
VALUES = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0, -0.0)
HUGE = 1 << 40


def _some(rng: random.Random, shape: tuple[int, ...]) -> Tensor:
    """Normal values, a few of them special."""
    tensor = torch.randn(shape)
    if tensor.numel() and rng.random() < 0.4:
        for _ in range(rng.randint(1, 4)):
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(VALUES)
    return tensor


def _bits(tensor: Tensor, rng: random.Random) -> Tensor:
    """The tensor's values with some replaced: special ones, or any bit pattern."""
    if not 0 < tensor.numel() < HUGE or tensor.element_size() != 4 or tensor.is_meta or tensor.layout != torch.strided:
        return tensor
    tensor = tensor.clone().contiguous()
    flat = tensor.view(torch.int32).view(-1)
    share = rng.choice((0.01, 0.3, 1.0))
    chosen = torch.rand(len(flat)) < share
    kind = rng.randrange(4)
    if kind == 0:
        flat[chosen] = torch.tensor(rng.choice(VALUES)).view(torch.int32)
    elif kind == 1:
        flat[chosen] = torch.randint(-(2**31), 2**31 - 1, (int(chosen.sum()),)).int()
    elif kind == 2:
        flat[chosen] = rng.choice((-1, 2**31 - 1, -(2**31), 1, 0))
    else:
        flat[chosen] = torch.randn(int(chosen.sum())).view(torch.int32)
    return tensor


def _misshapen(tensor: Tensor, rng: random.Random) -> Tensor:
    """The tensor with another shape, dtype, device, layout or strides."""
    if tensor.numel() >= HUGE:
        return tensor
    kind = rng.randrange(13)
    if kind == 0:
        return tensor.to(rng.choice(DTYPES))
    if kind == 1 and tensor.dim():
        axis = rng.randrange(tensor.dim())
        return tensor.narrow(axis, 0, rng.randint(0, tensor.shape[axis]))
    if kind == 2 and tensor.dim() > 1:
        return tensor.transpose(rng.randrange(tensor.dim()), rng.randrange(tensor.dim()))
    if kind == 3:
        return tensor[None]
    if kind == 4 and tensor.dim():
        return tensor.flatten()
    if kind == 5:
        return torch.empty(0, dtype=tensor.dtype)
    if kind == 6:
        return torch.zeros((), dtype=tensor.dtype)
    if kind == 7:
        return tensor.to("meta")
    if kind == 8:
        return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor
    if kind == 9 and tensor.numel():  # strides of 0, sizes beyond any memory
        sizes = list(tensor.shape) or [1]
        sizes[rng.randrange(len(sizes))] = rng.choice((HUGE, 3, 1))
        return tensor.reshape(-1)[0].expand(sizes)
    if kind == 10 and tensor.is_floating_point() and not tensor.is_meta:
        return tensor.to_sparse()
    if kind == 11:
        return torch.empty((0, HUGE, *tensor.shape[2:]), dtype=tensor.dtype)
    if kind == 12 and tensor.is_floating_point():
        return torch._neg_view(tensor)
    return tensor.flip(0) if tensor.dim() else tensor


def _number(value: int, rng: random.Random) -> int:
    return rng.choice((value, value, 0, -1, value + 1, -(2**63), 2**63 - 1, 2**31, 2**31 - 17, 1, value + 16))


def _arguments(name: str, rng: random.Random) -> list:
    """Arguments of an operator that it takes."""
    groups, dim = rng.randint(1, 3), rng.choice((1, 2, 4, 5, 8, 16, 33))
    codes = rng.choice((1, 2, 15, 16, 17, 40, 250, 300, 4097) if dim <= 8 else (1, 16, 40, 300))
    rows = rng.choice((0, 1, 3, 40))
    x, codebook = _some(rng, (rows, groups, dim)), _some(rng, (groups, codes, dim))
    indices = torch.randint(0, codes, (rows, groups))
    count = torch.zeros(groups, codes, dtype=torch.int64)
    if name == "nearest_code":
        return [x, codebook]
    if name == "nearest_by_metric":
        metric = rng.choice(("l2", "inner_product", "diagonal", "cosine", "", "\0"))
        return [x, codebook, rng.choice((None, torch.rand_like(x))), metric]
    if name == "quantize":
        return [x, codebook, rng.choice((None, count))]
    if name == "count_codes_":
        return [count, rng.choice((indices, indices - 1, indices + codes, indices * HUGE))]
    if name == "segment_sum":
        return [x, rng.choice((indices, indices - 1, indices + 1, indices * HUGE)), codes]
    if name == "index_build":
        return [codebook]
    arrays = list(torch.ops.revq.index_build(codebook))
    return [*arrays, codebook] if name == "index_refit_" else [x, *arrays, codes]


def _attack(arguments: list, name: str, rng: random.Random) -> list:
    """Some arguments replaced."""
    arguments = list(arguments)
    if name == "index_refit_" and rng.random() < 0.2:  # what is written overwrites the ids
        panels, ids = arguments[:2]
        arguments[1] = panels.view(torch.int32).view(-1)[: ids.numel()].view(ids.shape).copy_(ids)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        place = rng.randrange(len(arguments))
        value = arguments[place]
        if isinstance(value, Tensor):
            change = _bits if name.startswith("index_") and rng.random() < 0.7 else _misshapen
            arguments[place] = change(value, rng)
        elif isinstance(value, int) and not (name == "segment_sum" and rng.random() < 0.5):
            arguments[place] = _number(value, rng)
    if name == "segment_sum" and isinstance(arguments[2], int) and 2**20 < arguments[2] < 2**33:
        arguments[2] = 7  # that many sums are legal, and do not fit every machine
    return arguments


def _check(name: str, arguments: list, result: object) -> None:
    x = arguments[0]
    if name in ("nearest_code", "nearest_by_metric", "quantize", "index_search"):
        indices = {"quantize": 1, "index_search": 0}.get(name)
        found = result if indices is None else result[indices]  # type: ignore[index]
        assert found.dtype == torch.int64 and found.shape == x.shape[:-1], (name, found.shape)
        codes = arguments[-1] if name == "index_search" else arguments[1].shape[1]
        if not found.is_meta and found.numel():
            assert int(found.min()) >= 0 and int(found.max()) < codes, (name, found.min(), found.max(), codes)


def main(seed: int, calls: int) -> Counter:
    """How many calls of each operator raised and returned."""
    assert revq_kernels.native.load() is None
    torch.manual_seed(seed)
    rng, seen = random.Random(seed), Counter()
    names = [name for name in OPERATORS if name != "cpu_isa"] + ["index_search"] * 4 + ["index_refit_"]
    for _ in range(calls):
        name = rng.choice(names)
        operator = getattr(torch.ops.revq, name)
        arguments = _arguments(name, rng)
        overload = rng.choice(operator.overloads()) if rng.random() < 0.3 else "default"
        try:
            arguments = _attack(arguments, name, rng)
            result = getattr(operator, overload)(*arguments)
        except ERRORS:
            seen[name, "raised"] += 1
        else:
            _check(name, arguments, result)
            seen[name, "returned"] += 1
    return seen


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    for outcome, times in sorted(main(*numbers, *(0, 10_000)[len(numbers) :]).items()):
        print(*outcome, times)
