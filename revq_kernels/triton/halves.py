"""Numbers as tensor cores take them: centered, scaled and rounded to one float16, or to a sum of two."""

import triton
import triton.language as tl

from revq_kernels.triton import certificate

FAR = tl.constexpr(58000.0)
"""1/256 of the squared norm that outliers and columns past the last code pretend to have."""

RANGE = tl.constexpr(certificate.RANGE)
_SMALLEST_NORMAL = tl.constexpr(certificate.SMALLEST_NORMAL)


@triton.jit
def centered(raw, scaled_center, scale):
    """(raw - center) * scale, rounded once: the scale is a power of two.  A row of centers, a block of rows."""
    factor = tl.zeros(raw.shape, tl.float32) + scale
    return tl.fma(raw.to(tl.float32), factor, tl.broadcast_to(-scaled_center[None, :], raw.shape))


@triton.jit
def half(value):
    """The nearest float16, as float32."""
    return value.to(tl.float16).to(tl.float32)


@triton.jit
def normal(value, keep):
    """0 unless keep, and 0 for what float16 holds as a subnormal number: a tensor core may do anything with those."""
    return tl.where(tl.abs(value) > tl.where(keep, _SMALLEST_NORMAL, float("inf")), value, 0.0)


@triton.jit
def low_part(value, high):
    """What float16 holds of the rest; 0 for an outlier, whose high part may be infinite."""
    return half(normal(value - high, tl.abs(value) <= RANGE))


@triton.jit
def trusted_size(size, exists):
    """Queries in range, from their squared lengths; false for a NaN too."""
    return exists & (size <= RANGE * RANGE / 16)


@triton.jit
def query_parts(value, trusted, PARTS: tl.constexpr):
    """(high, low, |x_h|^2, |x' - x_h|^2) of centered numbers [Q, dims]; zeros unless trusted."""
    known = tl.where(trusted[:, None], value, 0.0)
    high = half(normal(known, trusted[:, None]))
    low = tl.zeros(high.shape, tl.float32)
    if PARTS == 3:
        low = low_part(known, high)
    lost = (known - high) - low
    return high, low, tl.sum((high + low) * (high + low), axis=1), tl.sum(lost * lost, axis=1)
