"""The certificate of a first pass: which codes may still be a query's nearest, proven from one approximate score.

docs/certificate.md holds the proof and defines every symbol; each constant below names the step it comes from.
Lengths are those of the centered, scaled space: x' = (x - m) * s, c' = (c - m) * s, and x_h, c_h are the vectors that
the first pass multiplies.  r = |x_h - c_h|, and the score S approximates r^2 + T - |x_h|^2.
"""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

RANGE = 1024.0
"""A code with |c'| above it is an outlier.  A form whose operands are float16 makes its vector 0, its score > RANGE^2."""

MAX_QUERY_NORM = (RANGE / 4) ** 2
"""Of |x'|^2: a query above it, or not finite, is not searched by a first pass."""

SMALLEST_NORMAL = 2.0**-14
"""Of float16.  Smaller operands of an MMA become 0: what it does with subnormal ones is not specified."""

MIN_SCALE = 2.0**-100
"""Of the powers of two s: then a code whose difference from the center overflows is an outlier in truth as well."""

SCORE_PAD = 2.0**-6
"""T = max |x_h|^2 * (1 + SCORE_PAD) + SCORE_PAD: no score is negative, so their bits order as integers."""

ULP = 2.0**-24
"""Half a unit in the last place of float32, relative: what one operation rounded to nearest may lose."""

MMA_LOSS = 2.0**-22
"""What one rounding inside an MMA may lose, relative to the largest magnitude; 2^-23 is what hardware was seen to do."""

_LARGEST_DISTANCE = tl.constexpr(2.0**62)  # unscaled; below it D does not overflow
_HALF_RANGE = tl.constexpr(0.5 * RANGE)
_REACH = tl.constexpr(0.4 * RANGE)


class Certificate(NamedTuple):
    """Constants of one form, all rounded up to float32; pass them to a kernel as one constexpr tuple."""

    eta_x: float
    """|x' - true x| <= eta_x * |x_h|: centering rounds once."""
    eta: float
    """|c_h - true c| <= eta * |c_h| + abs_r: centering, and the rounding to what is multiplied."""
    abs_r: float
    """What is flushed to zero of one vector."""
    acc_a: float
    acc_t: float
    abs_s: float
    rel: float
    """|S - (r^2 + T - a2)| <= acc_a * a2 + acc_t * T + abs_s + rel * r^2, T - a2 being rounded too."""
    d_rel: float
    d_abs: float
    """The nearest by D has r_true <= r_true(any other) * (1 + d_rel) + s * d_abs."""
    widen: float
    """1 / (1 - eta), and the rounding of the certificate's own few operations."""


def mma_roundings(terms: int) -> float:
    """How many roundings an MMA over so many terms may make; see docs/certificate.md, step 5."""
    return 1.5 * terms + 8


@lru_cache
def constants(form: str, d: int, parts: int = 1) -> Certificate:
    """The constants of ``form`` for vectors of ``d`` numbers.

    ``"tensor_core"``: operands float16; ``parts`` 1 multiplies high parts only, 3 is hi*hi + hi*lo + lo*hi, each of the
    d numbers and two slots for the norm being terms of the MMA.  ``"fma"``: float32 operands and accumulation.
    """
    u = ULP
    if form == "tensor_core" and parts in (1, 3):
        accumulation = mma_roundings(parts * d + 2) * MMA_LOSS
        dropped = 2.0**-22 * (1 + 2.0**-9) if parts == 3 else 0.0  # 2 x_lo.c_lo
        per_code = d * u + 3 * u + accumulation + dropped  # factor of n = |c_h|^2
        per_total = 3 * u + accumulation
        per_query = dropped
        per_distance = accumulation / 2 + u
        eta = (2.0**-11 if parts == 1 else 2.0**-23) + u * (1 + 2.0**-10)
        abs_r = math.sqrt(d) * SMALLEST_NORMAL * (1 + 2.0**-20)
        abs_s = 2.0**-17 + d * 2.0**-28  # the norm's low slot, and squares of flushed numbers
    elif form == "fma" and parts == 1:
        per_code = (2 * d + 2) * u
        per_total = (d + 1) * u
        per_query = u
        per_distance = d * u / 2
        eta = u * (1 + 2.0**-20)
        abs_r = math.sqrt(d) * 2.0**-60
        abs_s = 2.0**-40
    else:
        raise ValueError(f"form: expected 'tensor_core' with parts 1 or 3 or 'fma', got {form!r} with {parts}")
    # products of these errors, the norm's high slot above the norm, and the certificate's own rounding
    higher = 1 + 4 * (per_code + per_total) + 2.0**-10
    # n <= (|x_h| + r)^2 <= 1.25 |x_h|^2 + 5 r^2; then the rounding of a2 (d) and of T - a2
    acc_a = (1.25 * per_code + per_query + d * u) * higher
    acc_t = (per_total + 2 * u) * higher
    rel = (5 * per_code + per_distance + 8 * u) * higher
    if not (d >= 1 and acc_a + acc_t < SCORE_PAD / 4 and rel < 2.0**-5):
        raise ValueError(f"d: the bound of form {form!r} with parts {parts} does not hold for d={d}")
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
    """The smallest float32 not below a positive number: kernels compute with these constants in float32."""
    mantissa, exponent = math.frexp(value)
    return float(Fraction(math.ceil(Fraction(mantissa) * 2**24), 2**24)) * 2.0**exponent


@triton.jit
def certify(smallest, a2, x_error2, total, scale, C: tl.constexpr):
    """(offset, limit, published) of each query, from one score of one program.

    smallest   the smallest score S, not rounded down: its low bits, if they hold something else, set to ones.
    a2         |x_h|^2 as computed, at most (RANGE / 4)^2.
    x_error2   |x' - x_h|^2 as computed: 0 where x_h = x'.
    total      T, scale: s (scalars or vectors).
    C          the Certificate, in the order of its fields.

    ``max(S - offset, 0)`` of a score, rounded down or not, is what all programs of a query store and compare (see
    `distance_below`): it is at most r^2 * (1 + rel).  A code above ``limit`` is not the nearest.  A program appends its
    entries up to its own ``limit`` (-1: it has nothing near) and lowers the query's common limit to ``published``
    (inf: it has nothing to say); the smallest of these holds for the entries of all programs.
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
    real = smallest < float("inf")  # not so for the bits of an infinity with low bits set, which are a NaN
    published = tl.where(real & (far <= _REACH) & (far <= scale * _LARGEST_DISTANCE), limit, float("inf"))
    return offset, tl.where(real & (near <= _HALF_RANGE), limit, -1.0), published


@triton.jit
def distance_below(score, offset):
    """What is stored of a score: not above its r^2 * (1 + rel), and comparable between programs."""
    return tl.maximum(score - offset, 0.0)
