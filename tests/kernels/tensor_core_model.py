"""A numpy model of the first pass, with the roundings that tensor cores are known or allowed to have.

Products of float16 values are exact.  `Rounding` says how they are added: measured NVIDIA units take blocks of 4 to 16
products and the accumulator, align them to the largest, truncate each at some bit, and add.  PTX also allows other
orders and roundings.  Arrays have any leading dimensions; the last dimension is that of a vector.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from revq_kernels.triton import certificate as proven

Array = NDArray[np.floating]

F32 = np.float32


class Rounding(NamedTuple):
    """How a sum of exact products is formed."""

    name: str
    block: int = 0
    """Terms added at once beside the accumulator; 0: one at a time, each sum rounded to float32."""
    bits: int = 24
    """Bits that a term keeps, counted from the leading bit of the largest term (block > 0)."""
    truncate: bool = True
    """Whether sums are truncated to 24 bits; otherwise they are rounded to nearest."""
    order: str = "forward"


ROUNDINGS = (
    Rounding("4 terms, 24 bits", 4),
    Rounding("8 terms, 24 bits", 8),
    Rounding("16 terms, 24 bits", 16),
    Rounding("16 terms, 26 bits, to nearest", 16, 26, False),
    Rounding("4 terms, 23 bits", 4, 23),
    Rounding("16 terms, 23 bits", 16, 23),
    Rounding("4 terms, 23 bits, backward", 4, 23, True, "backward"),
    Rounding("8 terms, 24 bits, shuffled", 8, 24, True, "shuffled"),
    Rounding("one by one, to nearest", truncate=False),
    Rounding("one by one, truncated", truncate=True),
    Rounding("one by one, truncated, backward", order="backward"),
    Rounding("one by one, truncated, shuffled", order="shuffled"),
)


def truncated(value: Array, bits: int) -> Array:
    """float64 values with their mantissas truncated to ``bits`` bits."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


def accumulate(terms: Array, rounding: Rounding, start: Array | float = 0.0) -> NDArray[np.float32]:
    """Add exact terms ``[..., p]`` (float64) to ``start`` (float32 ``[...]``) as an MMA would."""
    count = terms.shape[-1]
    if rounding.order == "backward":
        terms = terms[..., ::-1]
    elif rounding.order == "shuffled":
        terms = terms[..., np.random.default_rng(count).permutation(count)]
    total = np.broadcast_to(np.asarray(start, np.float64), terms.shape[:-1])
    step = rounding.block or 1
    for first in range(0, count, step):
        block = terms[..., first : first + step]
        if rounding.block:
            _, exponent = np.frexp(np.maximum(np.abs(block).max(-1), np.abs(total)))
            unit = np.ldexp(1.0, exponent - rounding.bits)
            block = np.trunc(block / unit[..., None]) * unit[..., None]
            total = np.trunc(total / unit) * unit
        total = total + block.sum(-1)
        total = truncated(total, 24) if rounding.truncate else total.astype(F32).astype(np.float64)
    return total.astype(F32)


def half(value: Array) -> NDArray[np.float32]:
    """Rounded to float16, with subnormal results flushed to zero; as float32."""
    rounded = value.astype(np.float16).astype(F32)
    return np.where(np.abs(value) < F32(proven.SMALLEST_NORMAL), F32(0), rounded)


def float_sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sum over the last dimension in float32, in index order."""
    total = values[..., 0]
    for j in range(1, values.shape[-1]):
        total = total + values[..., j]
    return total


class Pass(NamedTuple):
    """The results of a first pass, per query ``[...]`` or per code ``[..., K]``, all float32."""

    score: Array
    a2: Array
    x_error2: Array
    truth: Array
    """|x_h - c_h|^2 in float64."""


def centered(value: NDArray[np.float32], center: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """(value - center) * scale, rounded twice."""
    return (value - center) * F32(scale)


def first_pass(
    x: NDArray[np.float32],
    codes: NDArray[np.float32],
    form: str,
    products: int,
    total: Array,
    rounding: Rounding,
    norm_in_slots: bool = True,
) -> Pass:
    """Scores of centered, scaled x ``[..., d]`` against codes ``[..., K, d]``; ``total`` is T ``[...]``."""
    x = x[..., None, :]
    total = np.asarray(total, F32)[..., None]
    x_high, c_high = (x, codes) if form == "fma" else (half(x), half(codes))
    x_low, c_low = (half(x - x_high), half(codes - c_high)) if products == 3 else (x_high * 0, c_high * 0)
    x_h, c_h = x_high + x_low, c_high + c_low  # exact
    norm = float_sum(c_h * c_h) + total
    if form == "fma":
        score = norm
        for j in range(x.shape[-1]):
            product = -2 * x_h[..., j].astype(np.float64) * c_h[..., j]
            if rounding.truncate:  # models a compiler that does not fuse multiply and add
                product = product.astype(F32)
            score = (score + product.astype(np.float64)).astype(F32)
    else:
        pairs = [(x_high, c_high)] + [(x_high, c_low), (x_low, c_high)] * (products == 3)
        terms = np.concatenate([-2.0 * a.astype(np.float64) * b for a, b in pairs], axis=-1)
        if norm_in_slots:
            high = half(norm * F32(2.0**-8))
            low = half((norm * F32(2.0**-8) - high) * F32(2.0**11))
            slots = np.stack([256.0 * high.astype(np.float64), 0.125 * low.astype(np.float64)], axis=-1)
            score = accumulate(np.concatenate([terms, slots], axis=-1), rounding)
        else:
            score = accumulate(terms, rounding) + norm
    lost = x - x_h
    truth = ((x_h.astype(np.float64) - c_h) ** 2).sum(-1)
    return Pass(score, float_sum(x_h * x_h)[..., 0], float_sum(lost * lost)[..., 0], truth)


def total_of(a2: Array) -> NDArray[np.float32]:
    """The smallest T of a program with a query of squared norm ``a2``."""
    return a2.astype(F32) * F32(1 + proven.SCORE_PAD) + F32(proven.SCORE_PAD)


def low_bits(score: NDArray[np.float32], id_bits: int, ones: bool) -> NDArray[np.float32]:
    """Scores with their low bits set to ones or zeros, as an upper or lower bound where they hold a step's number."""
    mask = np.int32((1 << id_bits) - 1)
    bits = score.view(np.int32)
    return (bits | mask if ones else bits & ~mask).view(F32)


@np.errstate(over="ignore", invalid="ignore")
def certify(
    smallest: Array, a2: Array, x_error2: Array, total: Array, scale: float, bound: proven.Certificate
) -> tuple[Array, Array, Array]:
    """As the kernels' `certify`: (offset, limit, published), each operation rounded to float32."""
    eta_x, eta, abs_r, acc_a, acc_t, abs_s, rel, d_rel, d_abs, widen = (F32(value) for value in bound)
    one, two, scale = F32(1), F32(2), F32(scale)
    slack = acc_a * a2 + acc_t * total + abs_s
    offset = (total - a2) + slack
    length = np.sqrt(a2)
    near = np.sqrt(np.maximum((smallest - offset) + two * slack, F32(0)) * (one + two * rel))
    error = np.sqrt(x_error2) * widen + eta_x * length + eta * (length + near) + abs_r
    gap = (two * error + d_rel * (near + error) + scale * d_abs) * widen
    far = near + gap
    limit = far * far * (one + two * rel)
    proves = (far <= F32(0.4 * proven.RANGE)) & (far <= scale * F32(2.0**62))
    return offset, np.where(near <= F32(proven.RANGE / 2), limit, F32(-1)), np.where(proves, limit, F32(np.inf))


def distance(x: NDArray[np.float32], codes: NDArray[np.float32]) -> NDArray[np.float32]:
    """The contract's exact distance: x ``[..., d]``, codes ``[..., K, d]`` -> float32 ``[..., K]``."""
    difference = x[..., None, :] - codes
    return float_sum(difference * difference)


class Verdict(NamedTuple):
    """The result of the certificate, per query."""

    excluded: NDArray[np.bool_]
    """The nearest code by exact distance is above the limit: the search would return a wrong index."""
    used: Array
    """(score of the nearest - smallest score) / (what the limit allows), without low bits: excluded above 1."""
    candidates: NDArray[np.int64]
    """Codes up to the limit."""
    certified: NDArray[np.bool_]
    """A limit was published."""


def judge(
    x: NDArray[np.float32],
    codes: NDArray[np.float32],
    bound: proven.Certificate,
    form: str,
    products: int,
    rounding: Rounding,
    *,
    center: Array | float = 0.0,
    scale: float = 1.0,
    spread: Array | float = 1.0,
    id_bits: int = 8,
    norm_in_slots: bool = True,
) -> Verdict:
    """One program over x ``[..., d]`` and codes ``[..., K, d]``; its largest |x_h|^2 is ``spread`` times that of x."""
    d = x.shape[-1]
    center = np.broadcast_to(np.asarray(center, F32), (d,))
    near_x, near_codes = centered(x, center, scale), centered(codes, center, scale)
    plain = first_pass(near_x, near_codes[..., :1, :], form, products, np.ones(x.shape[:-1]), ROUNDINGS[8])
    total = total_of((plain.a2 * spread).astype(F32))
    result = first_pass(near_x, near_codes, form, products, total, rounding, norm_in_slots)
    smallest = low_bits(result.score, id_bits, True).min(-1)
    offset, limit, published = certify(smallest, result.a2, result.x_error2, total, scale, bound)
    below = np.maximum(low_bits(result.score, id_bits, False) - offset[..., None], F32(0))
    winner = distance(x, codes).argmin(-1)[..., None]  # the lowest index among equal distances
    of_winner = np.take_along_axis(result.score, winner, -1)[..., 0]
    certified = published < np.inf
    allowed = limit.astype(np.float64) + offset - result.score.min(-1)
    used = np.where(certified, (of_winner.astype(np.float64) - result.score.min(-1)) / allowed, 0.0)
    excluded = certified & (np.take_along_axis(below, winner, -1)[..., 0] > limit)
    return Verdict(excluded, used, (below <= limit[..., None]).sum(-1), certified)
