"""The certificate of a first pass: which codes can still be a query's nearest, proven from one approximate score.

docs/certificate.md has the proof and defines every symbol.  Lengths are those of the centered, scaled space:
x' = (x - m) * s, c' = (c - m) * s, and x_h, c_h are the rounded vectors that the first pass multiplies.
r = |x_h - c_h|, and the score S approximates r^2 + T - |x_h|^2.

The bound for tensor cores assumes how an MMA rounds, because vendors document "at least single precision" and leave
order and rounding unspecified.  `tensor_cores_keep_the_bound` tests that assumption, once per device.
"""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

RANGE = 1024.0
"""A code with |c'| above RANGE is an outlier.  With float16 operands its vector becomes 0, its score > RANGE^2."""

MAX_QUERY_NORM = (RANGE / 4) ** 2
"""Largest |x'|^2 for a first pass: the fallback searches queries above it and queries that are not finite."""

SMALLEST_NORMAL = 2.0**-14
"""The smallest normal float16.  Smaller operands are flushed to 0: PTX does not say what an MMA does with subnormals."""

MIN_SCALE = 2.0**-100
"""Smallest scale s: a code whose difference from the center overflows is then an outlier in exact arithmetic too."""

SCORE_PAD = 2.0**-6
"""T = max |x_h|^2 * (1 + SCORE_PAD) + SCORE_PAD keeps scores positive, so that their bits order as integers."""

ULP = 2.0**-24
"""Half a unit in the last place of float32: the largest relative error of one operation rounded to nearest."""

MMA_LOSS = 2.0**-22
"""Assumed error of one rounding inside an MMA, relative to the largest operand; measured hardware loses up to 2^-23."""

TEST_ROWS = 64
"""Vectors on each side of the self-test's product; the widest MMA instruction takes as many."""

TEST_DEPTHS = (16, 32, 64)
"""Terms of one sum in the self-test; the largest is a chain of several instructions on every device."""

_ALL_ONES = 2 - 2.0**-10  # the float16 in [1, 2) with all bits of the mantissa set
_bound_kept: dict[torch.device, bool] = {}

_LARGEST_DISTANCE = tl.constexpr(2.0**62)  # unscaled; below it the exact distance does not overflow
_HALF_RANGE = tl.constexpr(0.5 * RANGE)
_REACH = tl.constexpr(0.4 * RANGE)


class Certificate(NamedTuple):
    """Constants of one form, rounded up to float32; kernels take them as one constexpr tuple in this order."""

    eta_x: float
    """|x' - true x| <= eta_x * |x_h|: centering rounds once."""
    eta: float
    """|c_h - true c| <= eta * |c_h| + abs_r: centering, and the rounding to what is multiplied."""
    abs_r: float
    """Bound on the part of one vector that is flushed to zero."""
    acc_a: float
    acc_t: float
    abs_s: float
    rel: float
    """|S - (r^2 + T - a2)| <= acc_a * a2 + acc_t * T + abs_s + rel * r^2, T - a2 being rounded too."""
    d_rel: float
    d_abs: float
    """The nearest by exact distance has r_true <= r_true(any other) * (1 + d_rel) + s * d_abs."""
    widen: float
    """1 / (1 - eta), times an allowance for the rounding of the certificate's own operations."""


def mma_roundings(terms: int) -> float:
    """Upper bound on the roundings of an MMA over ``terms`` terms; see docs/certificate.md, step 5."""
    return 1.5 * terms + 8


@lru_cache
def constants(form: str, d: int, products: int = 1) -> Certificate:
    """The constants of ``form`` for vectors of ``d`` elements.

    ``"tensor_core"``: float16 operands, and two slots of the MMA for the norm; ``products`` 1 multiplies high parts
    only, 3 sums hi*hi + hi*lo + lo*hi.  ``"fma"``: float32 operands and accumulation.

    Raises:
        ValueError: for another form, or where the bound does not hold for d.
    """
    u = ULP
    if form == "tensor_core" and products in (1, 3):
        accumulation = mma_roundings(products * d + 2) * MMA_LOSS
        dropped = 2.0**-22 * (1 + 2.0**-9) if products == 3 else 0.0  # 2 x_lo.c_lo
        per_code = d * u + 3 * u + accumulation + dropped  # factor of n = |c_h|^2
        per_total = 3 * u + accumulation
        per_query = dropped
        per_distance = accumulation / 2 + u
        eta = (2.0**-11 if products == 1 else 2.0**-23) + u * (1 + 2.0**-10)
        abs_r = math.sqrt(d) * SMALLEST_NORMAL * (1 + 2.0**-20)
        abs_s = 2.0**-17 + d * 2.0**-28  # the norm's low slot, and squares of flushed elements
    elif form == "fma" and products == 1:
        per_code = (2 * d + 2) * u
        per_total = (d + 1) * u
        per_query = u
        per_distance = d * u / 2
        eta = u * (1 + 2.0**-20)
        abs_r = math.sqrt(d) * 2.0**-60
        abs_s = 2.0**-40
    else:
        raise ValueError(f"form: expected 'tensor_core' with products 1 or 3 or 'fma', got {form!r} with {products}")
    # covers products of these errors, a high slot of the norm that rounds up, and the certificate's own rounding
    higher = 1 + 4 * (per_code + per_total) + 2.0**-10
    # n <= (|x_h| + r)^2 <= 1.25 |x_h|^2 + 5 r^2; d * u and 2 * u are the roundings of a2 and of T - a2
    acc_a = (1.25 * per_code + per_query + d * u) * higher
    acc_t = (per_total + 2 * u) * higher
    rel = (5 * per_code + per_distance + 8 * u) * higher
    if not (d >= 1 and acc_a + acc_t < SCORE_PAD / 4 and rel < 2.0**-5):
        raise ValueError(f"d: the bound of form {form!r} with products {products} does not hold for d={d}")
    gamma = (d + 2) * u / (1 - (d + 2) * u)
    values = Certificate(
        eta_x=u * (1 + 2.0**-9),
        eta=eta * (1 + 2 * d * u),
        abs_r=abs_r,
        acc_a=acc_a,
        acc_t=acc_t,
        abs_s=abs_s * higher,
        rel=rel,
        d_rel=math.sqrt((1 + gamma) / (1 - gamma)) - 1 + 2.0**-50,
        d_abs=math.sqrt(d) * 2.0**-74 * (1 + 2.0**-10),
        widen=(1 + 2.0**-18) / (1 - eta),
    )
    return Certificate(*map(_rounded_up, values))


def _rounded_up(value: float) -> float:
    """The smallest float32 that is >= a positive value: kernels compute with these constants in float32."""
    mantissa, exponent = math.frexp(value)
    return float(Fraction(math.ceil(Fraction(mantissa) * 2**24), 2**24)) * 2.0**exponent


@triton.jit
def certify(smallest, a2, x_error2, total, scale, C: tl.constexpr):
    """(offset, limit, published) of each query, from the smallest score that one program has seen.

    smallest   the smallest score S, rounded up: if its low bits hold a step's number, they are set to ones.
    a2         |x_h|^2 as computed, at most (RANGE / 4)^2.
    x_error2   |x' - x_h|^2 as computed: 0 where x_h = x'.
    total      T (scalar or vector); scale: s.
    C          the Certificate, in the order of its fields.

    All programs of a query store ``max(S - offset, 0)`` of a score (`distance_below`), which is at most
    r^2 * (1 + rel), also if S was rounded down.  A code whose stored value is above ``limit`` is not the nearest.  A
    program lists its entries up to its own ``limit`` (-1: none is near enough) and lowers the limit that all programs
    of the query share to ``published`` (inf: it proves nothing); the smallest published limit is valid for the entries
    of all programs.
    """
    ETA_X: tl.constexpr = C[0]
    ETA: tl.constexpr = C[1]
    ABS_R: tl.constexpr = C[2]
    ACC_A: tl.constexpr = C[3]
    ACC_T: tl.constexpr = C[4]
    ABS_S: tl.constexpr = C[5]
    REL: tl.constexpr = C[6]
    D_REL: tl.constexpr = C[7]
    D_ABS: tl.constexpr = C[8]
    WIDEN: tl.constexpr = C[9]
    slack = ACC_A * a2 + ACC_T * total + ABS_S
    offset = (total - a2) + slack
    length = tl.sqrt_rn(a2)
    near = tl.sqrt_rn(tl.maximum((smallest - offset) + 2 * slack, 0.0) * (1 + 2 * REL))  # >= r of the smallest score
    error = tl.sqrt_rn(x_error2) * WIDEN + ETA_X * length + ETA * (length + near) + ABS_R
    gap = (2 * error + D_REL * (near + error) + scale * D_ABS) * WIDEN
    far = near + gap  # >= r of the nearest code by D
    limit = far * far * (1 + 2 * REL)
    real = smallest < float("inf")  # false for an infinity whose low bits were set, which is a NaN
    published = tl.where(real & (far <= _REACH) & (far <= scale * _LARGEST_DISTANCE), limit, float("inf"))
    return offset, tl.where(real & (near <= _HALF_RANGE), limit, -1.0), published


@triton.jit
def distance_below(score, offset):
    """The stored value of a score: at most r^2 * (1 + rel), and comparable between programs."""
    return tl.maximum(score - offset, 0.0)


@triton.jit
def multiply(left, right, product, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """product float32 [ROWS, ROWS] = left float16 [ROWS, DEPTH] times the transpose of right float16 [ROWS, DEPTH]."""
    row = tl.arange(0, ROWS)[:, None]
    slot = tl.arange(0, DEPTH)[None, :]
    a = tl.load(left + row * DEPTH + slot)
    b = tl.load(right + row * DEPTH + slot)
    total = tl.dot(a, tl.trans(b), out_dtype=tl.float32)
    tl.store(product + row * ROWS + tl.arange(0, ROWS)[None, :], total)


def adversarial_operands(depth: int) -> tuple[Tensor, Tensor]:
    """Two float16 tensors [TEST_ROWS, depth] whose products are hard to add: no subnormals, no overflow."""
    generator = torch.Generator().manual_seed(depth)
    left = torch.ones(TEST_ROWS, depth, dtype=torch.float64)
    right = torch.ones(TEST_ROWS, depth, dtype=torch.float64)
    quarter = TEST_ROWS // 4

    def powers(low: int, high: int, *shape: int) -> Tensor:
        return 2.0 ** torch.randint(low, high, shape, generator=generator).double()

    # one large term and small terms of one sign with long mantissas, which a short alignment cuts off
    left[:quarter, 1:] = 2.0**-12
    small = 2.0 ** -(3.0 + torch.arange(quarter) % 12)[:, None].double() * _ALL_ONES
    right[:quarter, 1:] = small.clamp(min=SMALLEST_NORMAL)
    right[:quarter:2, -1] = -(2.0**12)  # cancels the large term: the sum of the small ones remains
    left[1:quarter:4] = left[1:quarter:4].flip(1)
    right[1:quarter:4] = right[1:quarter:4].flip(1)

    # full mantissas and powers of two, at random exponents and signs
    part = slice(quarter, 2 * quarter)
    for side in (left, right):
        sign = torch.randint(0, 2, (quarter, depth), generator=generator) * 2 - 1
        side[part] = powers(-13, 5, quarter, depth) * sign
    left[part] *= _ALL_ONES
    right[part][::2] *= _ALL_ONES

    # scores as the first pass computes them, [-2 x, 256, 1/8] times [c, hi, lo], with c near x so that terms cancel
    part = slice(2 * quarter, TEST_ROWS)
    rows = TEST_ROWS - 2 * quarter
    x = torch.randn(rows, depth - 2, generator=generator).double() * powers(0, 6, rows, 1)
    c = x * (1 + 2.0**-9 * torch.randn(x.shape, generator=generator))
    x, c = x.half().double(), c.half().double()
    norm = ((c * c).sum(1) + (x * x).sum(1) * (1 + SCORE_PAD) + SCORE_PAD) / 256
    high = norm.half().double()
    slots = torch.tensor([256.0, 0.125], dtype=torch.float64).expand(rows, 2)
    left[part] = torch.cat([-2 * x, slots], dim=1)
    right[part] = torch.cat([c, high[:, None], (norm - high)[:, None] * 2048], dim=1)
    return _without_subnormals(left), _without_subnormals(right)


def _without_subnormals(values: Tensor) -> Tensor:
    return torch.where(values.abs() < SMALLEST_NORMAL, 0, values).half()


def error_over_bound(left: Tensor, right: Tensor, product: Tensor) -> float:
    """The largest error of a product [R, R], divided by the error that the certificate allows; inf for a NaN."""
    terms = left.double()[:, None, :] * right.double()[None, :, :]
    allowed = mma_roundings(terms.shape[-1]) * MMA_LOSS * terms.abs().sum(-1)
    error = (product.double() - terms.sum(-1)).abs()
    return (error / allowed).nan_to_num(nan=torch.inf).max().item()


def tensor_cores_keep_the_bound(device: torch.device) -> bool:
    """Whether sums on this device stay within the assumed error; measured once per device.

    False, and measured later, while a CUDA graph is captured: the test launches a kernel and reads its result.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _bound_kept:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _bound_kept[device] = all(_measured_error(depth, device) <= 1 for depth in TEST_DEPTHS)
    return _bound_kept[device]


def _measured_error(depth: int, device: torch.device) -> float:
    left, right = adversarial_operands(depth)
    product = torch.empty(TEST_ROWS, TEST_ROWS, dtype=torch.float32, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        multiply[(1,)](left.to(device), right.to(device), product, ROWS=TEST_ROWS, DEPTH=depth, num_warps=4)
    return error_over_bound(left, right, product.cpu())
