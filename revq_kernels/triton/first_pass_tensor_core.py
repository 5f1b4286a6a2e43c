"""The first pass on tensor cores: scores of all codes by one matrix product in half precision, and a certificate.

A program takes BLOCK_QUERIES queries of one group and a range of its codes.  Queries and codes are centered, scaled and
rounded to float16 on the way; the product of [-2x, 256, 1/8, 0, ...] and [c, hi, lo, 0, ...] is the score itself,

    S = |c|^2 + T - 2 x.c        where 256 hi + lo/8 = |c|^2 + T      (norms of the rounded vectors),

and T keeps it positive: the loop over codes then takes one minimum per score and nothing else.  The norms stand in the
padding that the product's depth has anyway; dimensions that leave no room get a second product of depth 16.  With
PARTS = 3 every number is a sum of two float16, and S has the three terms of x.c that matter.
"""

import triton
import triton.language as tl

from revq_kernels.triton import certificate
from revq_kernels.triton.addressing import query_rows
from revq_kernels.triton.halves import FAR, RANGE, centered, half, low_part, normal, query_parts, trusted_size
from revq_kernels.triton.lanes import NO_SCORE, emit_candidates, lane_minimum, update_lanes

_PAD = tl.constexpr(certificate.SCORE_PAD)


@triton.jit
def _norm_parts(norm, shift, present):
    """(hi, lo) with 256 hi + lo/8 = norm + shift, or far away; of a NaN far below zero, where no score is."""
    total = tl.where(norm <= RANGE * RANGE, (norm + shift) * (1 / 256), FAR)
    total = tl.where(present, tl.where(norm != norm, -FAR, total), FAR)
    high = half(total)
    return high, normal((total - high) * 2048, True)


@triton.jit
def _pair_at(first, second, WIDTH: tl.constexpr, AT: tl.constexpr):
    """float32 [rows, WIDTH] with two scalars or tensors [rows, 1] in columns AT and AT + 1, zeros elsewhere."""
    column = tl.arange(0, WIDTH)[None, :]
    return tl.where(column == AT, first, tl.where(column == AT + 1, second, 0.0))


@triton.jit
def _to_half(value, INLINE_ASM: tl.constexpr):
    """float16 by an instruction of two at a time, which no compiler pass takes apart again."""
    if INLINE_ASM:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [value], dtype=tl.float16, is_pure=True, pack=2
        )
    return value.to(tl.float16)


@triton.jit
def _alternate(left, right):
    """[rows, n] twice -> [rows, 2n]: in registers, whatever the layout."""
    return tl.reshape(tl.join(left, right), [left.shape[0], left.shape[1] * 2])


@triton.jit
def _slots(first, second, third, norms, PARTS: tl.constexpr, DEPTH: tl.constexpr, INLINE_ASM: tl.constexpr):
    """The whole operand of a short vector, float16 [rows, DEPTH]: (first, norms), (second, third), ... alternating.

    Neighbors are joined last and as float32, so that every thread writes neighbors, converted two at a time.
    """
    left, right = first, norms
    if PARTS == 3:
        left, right = _alternate(first, second), _alternate(norms, third)
    if left.shape[1] * 2 < DEPTH:
        left, right = (
            _alternate(left, tl.zeros(left.shape, tl.float32)),
            _alternate(right, tl.zeros(left.shape, tl.float32)),
        )
    if left.shape[1] * 2 < DEPTH:
        left, right = (
            _alternate(left, tl.zeros(left.shape, tl.float32)),
            _alternate(right, tl.zeros(left.shape, tl.float32)),
        )
    return _to_half(_alternate(left, right), INLINE_ASM)


@triton.jit(do_not_specialize=["inner", "rows", "num_groups", "codebook_stride_g", "codebook_stride_k"])
def tensor_core(
    x, inner, x_stride_outer, x_stride_inner, x_stride_g, x_stride_d,
    codebook, codebook_stride_g, codebook_stride_k, codebook_stride_d,
    center, scale, limit, found, unsettled, entry_score, entry_first, rows, num_groups, num_codes, codes_per_split,
    D: tl.constexpr, DIMS: tl.constexpr, PARTS: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_CODES: tl.constexpr,
    CELL_TILES: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    ID_BITS: tl.constexpr, SLOTS: tl.constexpr, CERTIFICATE: tl.constexpr, CONTIGUOUS: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Program (q, s): block q mod ceil(rows / BLOCK_QUERIES) of a group's queries, the s-th codes_per_split codes.

    DIMS: the power of two from 2 to 16 that holds D.  codes_per_split: a multiple of BLOCK_CODES * CELL_TILES, at most
    2^ID_BITS times it.  CONTIGUOUS: the codebook is; its strides are not used then.  INLINE_ASM: False under the
    interpreter and on AMD.
    """
    SHORT: tl.constexpr = DIMS <= 8
    SHORTEST: tl.constexpr = DIMS <= 4
    WITHIN: tl.constexpr = (not SHORT) & (D + 2 <= DIMS)
    DEPTH: tl.constexpr = 32 if DIMS * (PARTS + 1) > 16 else 16
    query_blocks = tl.cdiv(rows, BLOCK_QUERIES)
    group = (tl.program_id(0) // query_blocks).to(tl.int64)
    first_query = (tl.program_id(0) % query_blocks).to(tl.int64) * BLOCK_QUERIES
    n = first_query + tl.arange(0, BLOCK_QUERIES)
    exists = n < rows
    row = query_rows(x, n, group, inner, x_stride_outer, x_stride_inner, x_stride_g)
    unit = tl.load(scale + group)
    dim = tl.arange(0, DIMS)
    middle = tl.load(center + group * D + dim, mask=dim < D, other=0.0) * unit
    inside = exists[:, None] & (dim < D)[None, :]
    value = centered(tl.load(row[:, None] + dim[None, :] * x_stride_d, mask=inside, other=0.0), middle, unit)
    trusted = trusted_size(tl.sum(value * value, axis=1), exists)
    tl.store(unsettled + n * num_groups + group, tl.full(n.shape, 1, tl.int32), mask=exists & (trusted == 0))
    high, low, norm, error = query_parts(value, trusted, PARTS)
    high *= -2
    low *= -2
    if SHORT:
        ones = _pair_at(256.0, 0.125, DIMS, 0) + tl.zeros(high.shape, tl.float32)
        query_high = _slots(high, high, low, ones, PARTS, DEPTH, False)
    else:
        if WITHIN:
            high += _pair_at(256.0, 0.125, DIMS, D)
        query_high = high.to(tl.float16)
        query_low = low.to(tl.float16)
        query_ones = tl.broadcast_to(_pair_at(256.0, 0.125, 16, 0), [BLOCK_QUERIES, 16]).to(tl.float16)
    shift = tl.max(norm, axis=0) * (1 + _PAD) + _PAD
    norm = tl.where(trusted, norm, -1.0)

    start = tl.program_id(1).to(tl.int64) * codes_per_split
    left = tl.minimum(num_codes - start, codes_per_split).to(tl.int32)
    tiles = tl.cdiv(left, BLOCK_CODES)
    column = tl.arange(0, BLOCK_CODES)
    stride_k = codebook_stride_k.to(tl.int64)
    stride_g = codebook_stride_g.to(tl.int64)
    stride_d = codebook_stride_d
    if CONTIGUOUS:
        stride_k = D
        stride_g = num_codes.to(tl.int64) * D
        stride_d = 1
    first_code = codebook + group * stride_g + start * stride_k
    offset = column[:, None] * stride_k + dim[None, :] * stride_d

    best = tl.full([BLOCK_QUERIES, A * C], NO_SCORE, tl.int32)
    second = best
    third = best
    raw = tl.load(first_code + offset, mask=(column < left)[:, None] & (dim < D)[None, :], other=0.0)
    for step in range(tl.cdiv(tiles, CELL_TILES)):
        cell = tl.full([BLOCK_QUERIES, A * C], NO_SCORE, tl.int32)
        for _ in range(tl.minimum(CELL_TILES, tiles - step * CELL_TILES)):
            present = column < left
            code = centered(raw, middle, unit)
            # the next numbers are on their way while these are multiplied
            left -= BLOCK_CODES
            first_code += BLOCK_CODES * stride_k
            raw = tl.load(first_code + offset, mask=(column < left)[:, None] & (dim < D)[None, :], other=0.0)
            rounded = half(code)
            code_low = code
            if PARTS == 3:
                code_low = low_part(code, rounded)
                rounded += code_low
            code_norm = tl.sum(rounded * rounded, axis=1)
            keep = (code_norm <= RANGE * RANGE)[:, None]
            code_high = normal(code, keep)
            if PARTS == 3:
                code_low = tl.where(keep, code_low, 0.0)
            hi, lo = _norm_parts(code_norm, shift, present)
            hi, lo = hi[:, None], lo[:, None]
            if SHORT:
                # in every pair of columns: those that the queries' zeros meet do not matter
                norms = tl.where((dim % 2 == 0)[None, :], hi, lo)
                operand = _slots(code_high, code_low, code_high, norms, PARTS, DEPTH, INLINE_ASM)
            elif WITHIN:
                operand = _to_half(code_high + _pair_at(hi, lo, DIMS, D), INLINE_ASM)
            else:
                operand = _to_half(code_high, INLINE_ASM)
            score = tl.dot(query_high, tl.trans(operand), out_dtype=tl.float32)
            if (PARTS == 3) & (not SHORT):
                score = tl.dot(query_high, tl.trans(_to_half(code_low, INLINE_ASM)), score)
                score = tl.dot(query_low, tl.trans(operand), score)
            if not (SHORT or WITHIN):
                score = tl.dot(query_ones, tl.trans(_to_half(_pair_at(hi, lo, 16, 0), INLINE_ASM)), score)
            cell = lane_minimum(cell, score.to(tl.int32, bitcast=True), A, B, C, E, INLINE_ASM)
        best, second, third = update_lanes(best, second, third, cell, step, ID_BITS)

    if SHORTEST:
        # computed once more: kept across the loop, the two would take the last registers of the tile
        origin = tl.load(center + group * D + dim, mask=dim < D, other=0.0) * unit
        inside = (n < rows)[:, None] & (dim < D)[None, :]
        value = centered(tl.load(row[:, None] + dim[None, :] * x_stride_d, mask=inside, other=0.0), origin, unit)
        trusted = trusted_size(tl.sum(value * value, axis=1), n < rows)
        high, low, norm, error = query_parts(value, trusted, PARTS)
    else:
        trusted = norm >= 0
    query = n * num_groups + group
    has_nan = (tl.min(best, axis=1) < 0).to(tl.int32)
    tl.store(unsettled + query, has_nan, mask=(n < rows) & (has_nan > 0))
    emit_candidates(
        best, second, third, norm, error, shift, unit, trusted, query, start, limit, found, unsettled, entry_score,
        entry_first, CERTIFICATE, A, B, C, E, CELL_TILES, ID_BITS, SLOTS,
    )  # fmt: skip
