"""The first pass on tensor cores: approximate scores of all codes by one float16 matrix product, then candidates.

A program takes BLOCK_QUERIES queries of one group and a range of its codes, which it centers, scales and rounds to
float16 as it reads them.  The product of [-2x, 256, 1/8, 0, ...] and [c, hi, lo, 0, ...] is the score itself,

    S = |c|^2 + T - 2 x.c        where 256 hi + lo/8 = |c|^2 + T      (norms of the rounded vectors),

and T keeps it positive, so that the loop over codes computes one minimum per score and nothing else.  The norm takes
two slots of the product's depth that would otherwise be padding; where d leaves no room, a second product of depth 16
adds it.  With PRODUCTS = 3 every value is the sum of two float16, and S includes hi*hi + hi*lo + lo*hi of x.c.

The functions that round to float16 also serve first_pass_long.py.
"""

import triton
import triton.language as tl

from revq_kernels.triton import certificate
from revq_kernels.triton.addressing import query_rows
from revq_kernels.triton.candidates import NO_SCORE, lane_minimum, list_candidates, update_lanes

FAR = tl.constexpr(58000.0)
"""1/256 of the squared norm that is assigned to outliers and to columns past the last code."""

RANGE = tl.constexpr(certificate.RANGE)
_SMALLEST_NORMAL = tl.constexpr(certificate.SMALLEST_NORMAL)
_PAD = tl.constexpr(certificate.SCORE_PAD)


@triton.jit
def centered(raw, scaled_center, scale):
    """(raw - center) * scale for rows [R, dims] and one scaled center [dims]; rounds once: scale is a power of 2."""
    factor = tl.zeros(raw.shape, tl.float32) + scale
    return tl.fma(raw.to(tl.float32), factor, tl.broadcast_to(-scaled_center[None, :], raw.shape))


@triton.jit
def half(value):
    """The nearest float16, as float32."""
    return value.to(tl.float16).to(tl.float32)


@triton.jit
def normal(value, keep):
    """0 unless keep, and 0 for subnormal float16 values, whose product on a tensor core is not specified."""
    return tl.where(tl.abs(value) > tl.where(keep, _SMALLEST_NORMAL, float("inf")), value, 0.0)


@triton.jit
def low_part(value, high):
    """The nearest float16 to value - high; 0 for an outlier, whose high part may be infinite."""
    return half(normal(value - high, tl.abs(value) <= RANGE))


@triton.jit
def within_range(squared_norm, exists):
    """Whether a query exists and is short enough for a first pass; false for a NaN too."""
    return exists & (squared_norm <= RANGE * RANGE / 16)


@triton.jit
def query_parts(value, in_range, PRODUCTS: tl.constexpr):
    """(high, low, |x_h|^2, |x' - x_h|^2) of centered values [Q, dims]; zeros unless in_range."""
    known = tl.where(in_range[:, None], value, 0.0)
    high = half(normal(known, in_range[:, None]))
    low = tl.zeros(high.shape, tl.float32)
    if PRODUCTS == 3:
        low = low_part(known, high)
    lost = (known - high) - low
    return high, low, tl.sum((high + low) * (high + low), axis=1), tl.sum(lost * lost, axis=1)


@triton.jit
def _norm_parts(norm, shift, present):
    """(hi, lo) with 256 hi + lo/8 = norm + shift; FAR for outliers and absent codes, -FAR if the norm is NaN.

    No valid score is negative, so a negative one tells the program that it has met a NaN.
    """
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
    """float16, two values per instruction; inline assembly keeps compiler passes from splitting the pair."""
    if INLINE_ASM:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [value], dtype=tl.float16, is_pure=True, pack=2
        )
    return value.to(tl.float16)


@triton.jit
def _alternate(left, right):
    """[rows, n] twice -> [rows, 2n] with alternating columns: stays in registers, whatever the layout."""
    return tl.reshape(tl.join(left, right), [left.shape[0], left.shape[1] * 2])


@triton.jit
def _interleaved_operand(
    first, second, third, norms, PRODUCTS: tl.constexpr, DEPTH: tl.constexpr, INLINE_ASM: tl.constexpr
):
    """The whole operand of a short vector, float16 [rows, DEPTH]: (first, norms), (second, third), ... alternating.

    Neighboring columns are joined last and as float32, so that every thread holds neighbors and converts two at a time.
    """
    left, right = first, norms
    if PRODUCTS == 3:
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
def first_pass_tensor_core(
    # queries [outer, inner, G, D]
    x,
    inner,
    x_stride_outer,
    x_stride_inner,
    x_stride_g,
    x_stride_d,
    # codes [G, K, D]
    codebook,
    codebook_stride_g,
    codebook_stride_k,
    codebook_stride_d,
    # per group
    center,
    scale,
    # the workspace, per query
    limit,
    entry_count,
    uncertified,
    entry_score,
    entry_first,
    # sizes
    rows,
    num_groups,
    num_codes,
    codes_per_split,
    # the product
    D: tl.constexpr,
    DIMS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    # lanes and entries
    CELL_TILES: tl.constexpr,
    OUTER_LANES: tl.constexpr,
    OUTER_MEMBERS: tl.constexpr,
    INNER_LANES: tl.constexpr,
    INNER_MEMBERS: tl.constexpr,
    ID_BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    CERTIFICATE: tl.constexpr,
    # properties of the codebook and of the target
    CONTIGUOUS: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """Program (q, s): block q mod ceil(rows / BLOCK_QUERIES) of a group's queries, the s-th codes_per_split codes.

    DIMS: the smallest power of two from 2 to 16 that is >= D.  codes_per_split: a multiple of BLOCK_CODES * CELL_TILES,
    at most 2^ID_BITS times it.  CONTIGUOUS: whether the codebook is; if so its strides are not used.  INLINE_ASM: False
    in the interpreter and on AMD.
    """
    SHORT: tl.constexpr = DIMS <= 8
    SHORTEST: tl.constexpr = DIMS <= 4
    WITHIN: tl.constexpr = (not SHORT) & (D + 2 <= DIMS)  # the norm fits into the padding of the vector
    DEPTH: tl.constexpr = 32 if DIMS * (PRODUCTS + 1) > 16 else 16
    query_blocks = tl.cdiv(rows, BLOCK_QUERIES)
    group = (tl.program_id(0) // query_blocks).to(tl.int64)
    first_query = (tl.program_id(0) % query_blocks).to(tl.int64) * BLOCK_QUERIES
    n = first_query + tl.arange(0, BLOCK_QUERIES)
    exists = n < rows
    row = query_rows(x, n, group, inner, x_stride_outer, x_stride_inner, x_stride_g)
    group_scale = tl.load(scale + group)
    dim = tl.arange(0, DIMS)
    scaled_center = tl.load(center + group * D + dim, mask=dim < D, other=0.0) * group_scale
    inside = exists[:, None] & (dim < D)[None, :]
    raw_x = tl.load(row[:, None] + dim[None, :] * x_stride_d, mask=inside, other=0.0)
    value = centered(raw_x, scaled_center, group_scale)
    in_range = within_range(tl.sum(value * value, axis=1), exists)
    tl.store(uncertified + n * num_groups + group, tl.full(n.shape, 1, tl.int32), mask=exists & (in_range == 0))
    high, low, norm, error = query_parts(value, in_range, PRODUCTS)
    high *= -2
    low *= -2
    if SHORT:
        ones = _pair_at(256.0, 0.125, DIMS, 0) + tl.zeros(high.shape, tl.float32)
        query_high = _interleaved_operand(high, high, low, ones, PRODUCTS, DEPTH, False)
    else:
        if WITHIN:
            high += _pair_at(256.0, 0.125, DIMS, D)
        query_high = high.to(tl.float16)
        query_low = low.to(tl.float16)
        query_ones = tl.broadcast_to(_pair_at(256.0, 0.125, 16, 0), [BLOCK_QUERIES, 16]).to(tl.float16)
    shift = tl.max(norm, axis=0) * (1 + _PAD) + _PAD
    norm = tl.where(in_range, norm, -1.0)

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

    best = tl.full([BLOCK_QUERIES, OUTER_LANES * INNER_LANES], NO_SCORE, tl.int32)
    second = best
    third = best
    raw = tl.load(first_code + offset, mask=(column < left)[:, None] & (dim < D)[None, :], other=0.0)
    for step in range(tl.cdiv(tiles, CELL_TILES)):
        cell = tl.full([BLOCK_QUERIES, OUTER_LANES * INNER_LANES], NO_SCORE, tl.int32)
        for _ in range(tl.minimum(CELL_TILES, tiles - step * CELL_TILES)):
            present = column < left
            code = centered(raw, scaled_center, group_scale)
            # load the next tile now, so that the load overlaps with the product of this one
            left -= BLOCK_CODES
            first_code += BLOCK_CODES * stride_k
            raw = tl.load(first_code + offset, mask=(column < left)[:, None] & (dim < D)[None, :], other=0.0)
            rounded = half(code)
            code_low = code
            if PRODUCTS == 3:
                code_low = low_part(code, rounded)
                rounded += code_low
            code_norm = tl.sum(rounded * rounded, axis=1)
            keep = (code_norm <= RANGE * RANGE)[:, None]
            code_high = normal(code, keep)
            if PRODUCTS == 3:
                code_low = tl.where(keep, code_low, 0.0)
            hi, lo = _norm_parts(code_norm, shift, present)
            hi, lo = hi[:, None], lo[:, None]
            if SHORT:
                # every pair of columns holds (hi, lo): all but one of them meet zeros of the query's operand
                norms = tl.where((dim % 2 == 0)[None, :], hi, lo)
                operand = _interleaved_operand(code_high, code_low, code_high, norms, PRODUCTS, DEPTH, INLINE_ASM)
            elif WITHIN:
                operand = _to_half(code_high + _pair_at(hi, lo, DIMS, D), INLINE_ASM)
            else:
                operand = _to_half(code_high, INLINE_ASM)
            score = tl.dot(query_high, tl.trans(operand), out_dtype=tl.float32)
            if (PRODUCTS == 3) & (not SHORT):
                score = tl.dot(query_high, tl.trans(_to_half(code_low, INLINE_ASM)), score)
                score = tl.dot(query_low, tl.trans(operand), score)
            if not (SHORT or WITHIN):
                score = tl.dot(query_ones, tl.trans(_to_half(_pair_at(hi, lo, 16, 0), INLINE_ASM)), score)
            bits = score.to(tl.int32, bitcast=True)
            cell = lane_minimum(cell, bits, OUTER_LANES, OUTER_MEMBERS, INNER_LANES, INNER_MEMBERS, INLINE_ASM)
        best, second, third = update_lanes(best, second, third, cell, step, ID_BITS)

    if SHORTEST:
        # computed again, because keeping norm and error across the loop would take the last registers of the tile
        origin = tl.load(center + group * D + dim, mask=dim < D, other=0.0) * group_scale
        inside = (n < rows)[:, None] & (dim < D)[None, :]
        raw_x = tl.load(row[:, None] + dim[None, :] * x_stride_d, mask=inside, other=0.0)
        value = centered(raw_x, origin, group_scale)
        in_range = within_range(tl.sum(value * value, axis=1), n < rows)
        high, low, norm, error = query_parts(value, in_range, PRODUCTS)
    else:
        in_range = norm >= 0
    query = n * num_groups + group
    has_nan = (tl.min(best, axis=1) < 0).to(tl.int32)
    tl.store(uncertified + query, has_nan, mask=(n < rows) & (has_nan > 0))
    list_candidates(
        best,
        second,
        third,
        norm,
        error,
        shift,
        group_scale,
        in_range,
        query,
        start,
        limit,
        entry_count,
        uncertified,
        entry_score,
        entry_first,
        CERTIFICATE,
        OUTER_LANES,
        OUTER_MEMBERS,
        INNER_LANES,
        INNER_MEMBERS,
        CELL_TILES,
        ID_BITS,
        SLOTS,
    )
