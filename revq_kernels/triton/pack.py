"""Queries and codes as long vectors are multiplied: float16 rows in the workspace, with their norms.

A first pass over short vectors rounds the codes on its way.  The work of that grows with the vectors, and every block of
queries does it again: from some length on, one pass that rounds everything once is cheaper, and leaves rows that lie as
a matrix product wants them, with no masks, strides or other types to be minded.

Every row is padded with zeros to PITCH numbers, and every group to whole blocks of rows: a row that pads has the norm
that keeps it from being chosen.
"""

import triton
import triton.language as tl

from revq_kernels.triton.addressing import query_rows
from revq_kernels.triton.halves import FAR, RANGE, centered, half, low_part, normal, query_parts, trusted_size

_FAR_NORM = tl.constexpr(256 * FAR.value)


@triton.jit(do_not_specialize=["first_group", "first_code", "num_codes"])
def pack_codes(
    codebook, codebook_stride_g, codebook_stride_k, codebook_stride_d, center, scale, high, low, norm,
    first_group, first_code, num_codes, packed_codes,
    D: tl.constexpr, PADDED_D: tl.constexpr, PITCH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (b, g): the b-th ROWS of the codes from ``first_code`` on, of group ``first_group`` + g.

    high, low: float16 [groups, packed_codes, PITCH], norm: float32 [groups, packed_codes]; ``packed_codes`` is a
    multiple of ROWS.  low is not touched with PARTS = 1.  PADDED_D: a power of two that is at least PITCH.

    The vector of an outlier is 0.  The norm of a NaN is far below zero, where no score is: who meets it knows.
    """
    group = tl.program_id(1).to(tl.int64) + first_group
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    code = first_code.to(tl.int64) + place
    dim = tl.arange(0, PADDED_D)
    present = code < num_codes
    row = codebook + group * codebook_stride_g + code * codebook_stride_k
    numbers = row[:, None] + dim[None, :].to(tl.int64) * codebook_stride_d
    raw = tl.load(numbers, mask=present[:, None] & (dim < D)[None, :], other=0.0)
    unit = tl.load(scale + group)
    value = centered(raw, tl.load(center + group * D + dim, mask=dim < D, other=0.0) * unit, unit)
    rounded = half(value)
    rest = tl.zeros(value.shape, tl.float32)
    if PARTS == 3:
        rest = low_part(value, rounded)
        rounded += rest
    size = tl.sum(rounded * rounded, axis=1)
    keep = (present & (size <= RANGE * RANGE))[:, None]
    size_or_far = tl.where(keep, size[:, None], _FAR_NORM)
    size_or_far = tl.where(present[:, None] & (size != size)[:, None], -_FAR_NORM, size_or_far)
    packed = tl.program_id(1).to(tl.int64) * packed_codes + place
    target = packed[:, None] * PITCH + dim[None, :]
    tl.store(high + target, normal(value, keep).to(tl.float16), mask=(dim < PITCH)[None, :])
    if PARTS == 3:
        tl.store(low + target, tl.where(keep, rest, 0.0).to(tl.float16), mask=(dim < PITCH)[None, :])
    tl.store(norm + packed, tl.sum(size_or_far, axis=1))


@triton.jit(do_not_specialize=["inner", "first_group", "rows", "num_groups"])
def pack_queries(
    x, inner, x_stride_outer, x_stride_inner, x_stride_g, x_stride_d, center, scale, high, low, norm, error, unsettled,
    first_group, rows, num_groups, packed_rows,
    D: tl.constexpr, PADDED_D: tl.constexpr, PITCH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (b, g): the b-th ROWS queries of group ``first_group`` + g, times -2.

    high, low: float16 [groups, packed_rows, PITCH]; norm, error: float32 [groups, packed_rows], |x_h|^2 and
    |x' - x_h|^2.  ``packed_rows`` is a multiple of ROWS.  A query that is out of range becomes ``unsettled``; its
    vector is 0 and its norm -1, as for rows that pad.
    """
    group = tl.program_id(1).to(tl.int64) + first_group
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_D)
    exists = n < rows
    row = query_rows(x, n, group, inner, x_stride_outer, x_stride_inner, x_stride_g)
    numbers = row[:, None] + dim[None, :].to(tl.int64) * x_stride_d
    raw = tl.load(numbers, mask=exists[:, None] & (dim < D)[None, :], other=0.0)
    unit = tl.load(scale + group)
    value = centered(raw, tl.load(center + group * D + dim, mask=dim < D, other=0.0) * unit, unit)
    trusted = trusted_size(tl.sum(value * value, axis=1), exists)
    query = n.to(tl.int64) * num_groups + group
    tl.store(unsettled + query, tl.full(n.shape, 1, tl.int32), mask=exists & (trusted == 0))
    rounded, rest, size, lost = query_parts(value, trusted, PARTS)
    packed = tl.program_id(1).to(tl.int64) * packed_rows + n
    target = packed[:, None] * PITCH + dim[None, :]
    tl.store(high + target, (-2 * rounded).to(tl.float16), mask=(dim < PITCH)[None, :])
    if PARTS == 3:
        tl.store(low + target, (-2 * rest).to(tl.float16), mask=(dim < PITCH)[None, :])
    tl.store(norm + packed, tl.where(trusted, size, -1.0))
    tl.store(error + packed, lost)
