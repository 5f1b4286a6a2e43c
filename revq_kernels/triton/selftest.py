"""Does this device's MMA add as precisely as the certificate supposes?  Asked once per device, before its first use.

The documents promise sums of "at least single precision" and leave order and rounding open (docs/certificate.md).  The
bound stands on one reading of that promise, with a bit to spare; this test multiplies vectors that would show another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from revq_kernels.triton.certificate import MMA_LOSS, SCORE_PAD, SMALLEST_NORMAL, mma_roundings

ROWS = 64
"""Vectors on each side; as many as an instruction of the widest kind takes."""

DEPTHS = (16, 32, 64)
"""Terms of one sum; the largest is a chain of instructions on every device."""

ALL_ONES = 2 - 2.0**-10
"""The longest mantissa of float16."""

_known: dict[torch.device, bool] = {}


@triton.jit
def multiply(left, right, product, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """product float32 [ROWS, ROWS] = left float16 [ROWS, DEPTH] times right float16 [ROWS, DEPTH], transposed."""
    row = tl.arange(0, ROWS)[:, None]
    slot = tl.arange(0, DEPTH)[None, :]
    a = tl.load(left + row * DEPTH + slot)
    b = tl.load(right + row * DEPTH + slot)
    total = tl.dot(a, tl.trans(b), out_dtype=tl.float32)
    tl.store(product + row * ROWS + tl.arange(0, ROWS)[None, :], total)


def adversaries(depth: int) -> tuple[Tensor, Tensor]:
    """Two float16 tensors [ROWS, depth] whose products are hard to add: no subnormal, no overflow."""
    generator = torch.Generator().manual_seed(depth)
    left = torch.ones(ROWS, depth, dtype=torch.float64)
    right = torch.ones(ROWS, depth, dtype=torch.float64)
    quarter = ROWS // 4

    def powers(low: int, high: int, *shape: int) -> Tensor:
        return 2.0 ** torch.randint(low, high, shape, generator=generator).double()

    # one large term among small ones that a short alignment loses, all of one sign and all with long mantissas
    left[:quarter, 1:] = 2.0**-12
    small = 2.0 ** -(3.0 + torch.arange(quarter) % 12)[:, None].double() * ALL_ONES
    right[:quarter, 1:] = small.clamp(min=SMALLEST_NORMAL)
    right[:quarter:2, -1] = -(2.0**12)  # and its negative: the sum of the small ones alone is left
    left[1:quarter:4] = left[1:quarter:4].flip(1)
    right[1:quarter:4] = right[1:quarter:4].flip(1)

    part = slice(quarter, 2 * quarter)  # mantissas of ones, and powers of two, at random exponents and signs
    for side in (left, right):
        sign = torch.randint(0, 2, (quarter, depth), generator=generator) * 2 - 1
        side[part] = powers(-13, 5, quarter, depth) * sign
    left[part] *= ALL_ONES
    right[part][::2] *= ALL_ONES

    part = slice(2 * quarter, ROWS)  # scores: -2 x, 256, 1/8 against c, hi, lo with c near x: they cancel
    rows = ROWS - 2 * quarter
    x = torch.randn(rows, depth - 2, generator=generator).double() * powers(0, 6, rows, 1)
    c = x * (1 + 2.0**-9 * torch.randn(x.shape, generator=generator))
    x, c = x.half().double(), c.half().double()
    norm = ((c * c).sum(1) + (x * x).sum(1) * (1 + SCORE_PAD) + SCORE_PAD) / 256
    high = norm.half().double()
    slots = torch.tensor([256.0, 0.125], dtype=torch.float64).expand(rows, 2)
    left[part] = torch.cat([-2 * x, slots], dim=1)
    right[part] = torch.cat([c, high[:, None], (norm - high)[:, None] * 2048], dim=1)
    return _normal(left), _normal(right)


def _normal(values: Tensor) -> Tensor:
    return torch.where(values.abs() < SMALLEST_NORMAL, 0, values).half()


def excess(left: Tensor, right: Tensor, product: Tensor) -> float:
    """The largest error of products [ROWS, ROWS] relative to what the certificate supposes: at most 1 is well."""
    terms = left.double()[:, None, :] * right.double()[None, :, :]
    allowed = mma_roundings(terms.shape[-1]) * MMA_LOSS * terms.abs().sum(-1)
    error = (product.double() - terms.sum(-1)).abs()
    return (error / allowed).nan_to_num(nan=torch.inf).max().item()


def tensor_cores_keep_the_bound(device: torch.device) -> bool:
    """Whether sums on this device are within the supposed error; False, for now, while a CUDA graph is captured."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # the answer needs a launch of its own, and the host to read it
        _known[device] = all(_measured(depth, device) <= 1 for depth in DEPTHS)
    return _known[device]


def _measured(depth: int, device: torch.device) -> float:
    left, right = adversaries(depth)
    product = torch.empty(ROWS, ROWS, dtype=torch.float32, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        multiply[(1,)](left.to(device), right.to(device), product, ROWS=ROWS, DEPTH=depth, num_warps=4)
    return excess(left, right, product.cpu())
