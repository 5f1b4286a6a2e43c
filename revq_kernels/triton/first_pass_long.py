"""The first pass on tensor cores for long vectors: round and pack all vectors once, then multiply the packed rows.

The first pass for short vectors rounds codes as it reads them, once per block of queries.  That work grows with d; from
MIN_LONG_D on it is cheaper to round every vector once, into float16 rows in the workspace with their norms.  Those rows
are contiguous and aligned, so the matrix product needs no masks, strides or conversions.  Every row is padded with
zeros to PITCH elements, and every group to whole blocks of rows, whose norms keep them out of the result.

`first_pass_long` keeps its queries (packed with a factor -2), streams codes past them, and starts each product from the
code's norm and T, added in float32:

    S = (|c|^2 + T) - 2 x.c

Lanes, entries and candidates are as for short vectors (candidates.py).
"""

# mypy: disable-error-code="assignment,misc"
# Triton unrolls loops over tuples, so that a variable holds tuples of several lengths.

import triton
import triton.language as tl

from revq_kernels.triton import certificate
from revq_kernels.triton.addressing import query_rows
from revq_kernels.triton.candidates import NO_SCORE, lane_minimum, list_candidates, update_lanes
from revq_kernels.triton.first_pass_tensor_core import (
    FAR,
    RANGE,
    centered,
    half,
    low_part,
    normal,
    query_parts,
    within_range,
)

_FAR_NORM = tl.constexpr(256 * FAR.value)
_PAD = tl.constexpr(certificate.SCORE_PAD)


@triton.jit(do_not_specialize=["first_group", "first_code", "num_codes"])
def pack_codes(
    # codes [G, K, D]
    codebook,
    codebook_stride_g,
    codebook_stride_k,
    codebook_stride_d,
    # per group
    center,
    scale,
    # results: float16 [groups, packed_codes, PITCH] twice, float32 [groups, packed_codes]
    high,
    low,
    norm,
    # sizes
    first_group,
    first_code,
    num_codes,
    packed_codes,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Program (b, g): the b-th ROWS codes, counted from ``first_code``, of group ``first_group`` + g.

    ``packed_codes`` is a multiple of ROWS.  PRODUCTS = 1 does not write ``low``.  PADDED_D: a power of two >= PITCH.

    The vector of an outlier is 0.  The norm of a code with a NaN is far below zero, and so are its scores: no valid
    score is negative, so a program that finds one knows that it has met a NaN.
    """
    group = tl.program_id(1).to(tl.int64) + first_group
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    code = first_code.to(tl.int64) + place
    dim = tl.arange(0, PADDED_D)
    present = code < num_codes
    row = codebook + group * codebook_stride_g + code * codebook_stride_k
    elements = row[:, None] + dim[None, :].to(tl.int64) * codebook_stride_d
    raw = tl.load(elements, mask=present[:, None] & (dim < D)[None, :], other=0.0)
    group_scale = tl.load(scale + group)
    value = centered(raw, tl.load(center + group * D + dim, mask=dim < D, other=0.0) * group_scale, group_scale)
    rounded = half(value)
    rest = tl.zeros(value.shape, tl.float32)
    if PRODUCTS == 3:
        rest = low_part(value, rounded)
        rounded += rest
    size = tl.sum(rounded * rounded, axis=1)
    keep = (present & (size <= RANGE * RANGE))[:, None]
    size_or_far = tl.where(keep, size[:, None], _FAR_NORM)
    size_or_far = tl.where(present[:, None] & (size != size)[:, None], -_FAR_NORM, size_or_far)
    packed = tl.program_id(1).to(tl.int64) * packed_codes + place
    target = packed[:, None] * PITCH + dim[None, :]
    tl.store(high + target, normal(value, keep).to(tl.float16), mask=(dim < PITCH)[None, :])
    if PRODUCTS == 3:
        tl.store(low + target, tl.where(keep, rest, 0.0).to(tl.float16), mask=(dim < PITCH)[None, :])
    tl.store(norm + packed, tl.sum(size_or_far, axis=1))


@triton.jit(do_not_specialize=["inner", "first_group", "rows", "num_groups"])
def pack_queries(
    # queries [outer, inner, G, D]
    x,
    inner,
    x_stride_outer,
    x_stride_inner,
    x_stride_g,
    x_stride_d,
    # per group
    center,
    scale,
    # results: float16 [groups, packed_rows, PITCH] twice, float32 [groups, packed_rows] twice (|x_h|^2, |x' - x_h|^2)
    high,
    low,
    norm,
    error,
    # the workspace, per query
    uncertified,
    # sizes
    first_group,
    rows,
    num_groups,
    packed_rows,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Program (b, g): the b-th ROWS queries of group ``first_group`` + g, times -2.

    ``packed_rows`` is a multiple of ROWS.  A query that is out of range becomes ``uncertified``; its vector is 0 and
    its norm -1, as for rows of padding.
    """
    group = tl.program_id(1).to(tl.int64) + first_group
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_D)
    exists = n < rows
    row = query_rows(x, n, group, inner, x_stride_outer, x_stride_inner, x_stride_g)
    elements = row[:, None] + dim[None, :].to(tl.int64) * x_stride_d
    raw = tl.load(elements, mask=exists[:, None] & (dim < D)[None, :], other=0.0)
    group_scale = tl.load(scale + group)
    value = centered(raw, tl.load(center + group * D + dim, mask=dim < D, other=0.0) * group_scale, group_scale)
    in_range = within_range(tl.sum(value * value, axis=1), exists)
    query = n.to(tl.int64) * num_groups + group
    tl.store(uncertified + query, tl.full(n.shape, 1, tl.int32), mask=exists & (in_range == 0))
    rounded, rest, size, lost = query_parts(value, in_range, PRODUCTS)
    packed = tl.program_id(1).to(tl.int64) * packed_rows + n
    target = packed[:, None] * PITCH + dim[None, :]
    tl.store(high + target, (-2 * rounded).to(tl.float16), mask=(dim < PITCH)[None, :])
    if PRODUCTS == 3:
        tl.store(low + target, (-2 * rest).to(tl.float16), mask=(dim < PITCH)[None, :])
    tl.store(norm + packed, tl.where(in_range, size, -1.0))
    tl.store(error + packed, lost)


@triton.jit(do_not_specialize=["rows", "num_groups", "first_group", "first_code"])
def first_pass_long(
    # packed queries and codes, see pack_queries and pack_codes
    query_high,
    query_low,
    query_norm,
    query_error,
    code_high,
    code_low,
    code_norm,
    # per group
    scale,
    # the workspace, per query
    limit,
    entry_count,
    uncertified,
    entry_score,
    entry_first,
    # sizes
    rows,
    packed_rows,
    num_groups,
    first_group,
    first_code,
    packed_codes,
    codes_per_split,
    # the product
    PITCH: tl.constexpr,
    DEPTHS: tl.constexpr,
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
    # properties of the target
    STAGES: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """Program (b, s): the b-th BLOCK_QUERIES rows, all groups one after another; the s-th codes_per_split codes.

    packed_rows is a multiple of BLOCK_QUERIES, packed_codes of BLOCK_CODES.  DEPTHS: depths of the matrix products,
    powers of two >= 16 that add up to PITCH.  codes_per_split: a multiple of BLOCK_CODES * CELL_TILES, at most
    2^ID_BITS times it.  STAGES: 2 loads the next tile of codes while one is multiplied; shared memory then holds both.
    """
    blocks = packed_rows // BLOCK_QUERIES
    packed_group = (tl.program_id(0) // blocks).to(tl.int64)
    first_row = (tl.program_id(0) % blocks) * BLOCK_QUERIES
    member = tl.arange(0, BLOCK_QUERIES)
    packed = packed_group * packed_rows + first_row
    high = query_high + packed * PITCH
    low = query_low + packed * PITCH
    queries = ()
    queries_low = ()
    for i in tl.static_range(len(DEPTHS)):
        inside = member[:, None] * PITCH + tl.arange(0, DEPTHS[i])[None, :]
        queries = queries + (tl.load(high + inside),)  # noqa: RUF005 (Triton has no unpacking)
        if PRODUCTS == 3:
            queries_low = queries_low + (tl.load(low + inside),)  # noqa: RUF005
        high += DEPTHS[i]
        low += DEPTHS[i]
    norm = tl.load(query_norm + packed + member)
    shift = tl.maximum(tl.max(norm, axis=0), 0.0) * (1 + _PAD) + _PAD

    start = tl.program_id(1) * codes_per_split
    tiles = tl.cdiv(tl.minimum(packed_codes - start, codes_per_split), BLOCK_CODES)
    column = tl.arange(0, BLOCK_CODES)
    code = packed_group * packed_codes + start
    norms = code_norm + code
    high = code_high + code * PITCH
    low = code_low + code * PITCH
    best = tl.full([BLOCK_QUERIES, OUTER_LANES * INNER_LANES], NO_SCORE, tl.int32)
    second = best
    third = best
    cell = best
    next_norms = tl.load(norms + column)
    for tile in tl.range(tiles, num_stages=STAGES):
        score = tl.broadcast_to((next_norms + shift)[None, :], [BLOCK_QUERIES, BLOCK_CODES])
        # load the norms of the next tile before multiplying this one; the last tile loads its own again
        next_norms = tl.load(norms + tl.minimum(tile + 1, tiles - 1) * BLOCK_CODES + column)
        codes = high
        codes_low = low
        for i in tl.static_range(len(DEPTHS)):
            place = column[:, None] * PITCH + tl.arange(0, DEPTHS[i])[None, :]
            operand = tl.trans(tl.load(codes + place))
            score = tl.dot(queries[i], operand, score)
            if PRODUCTS == 3:
                score = tl.dot(queries_low[i], operand, score)
                score = tl.dot(queries[i], tl.trans(tl.load(codes_low + place)), score)
            codes += DEPTHS[i]
            codes_low += DEPTHS[i]
        bits = score.to(tl.int32, bitcast=True)
        cell = lane_minimum(cell, bits, OUTER_LANES, OUTER_MEMBERS, INNER_LANES, INNER_MEMBERS, INLINE_ASM)
        if ((tile + 1) % CELL_TILES == 0) | (tile + 1 == tiles):
            best, second, third = update_lanes(best, second, third, cell, tile // CELL_TILES, ID_BITS)
            # resets the cell; with a plain constant the compiler would add a select to every tile
            cell = tl.maximum(cell, NO_SCORE)
        high += BLOCK_CODES * PITCH
        low += BLOCK_CODES * PITCH

    group = packed_group + first_group
    n = first_row + member
    query = n.to(tl.int64) * num_groups + group
    has_nan = (tl.min(best, axis=1) < 0).to(tl.int32)
    tl.store(uncertified + query, has_nan, mask=(n < rows) & (has_nan > 0))
    norm = tl.load(query_norm + packed + member)
    error = tl.load(query_error + packed + member)
    list_candidates(
        best,
        second,
        third,
        norm,
        error,
        shift,
        tl.load(scale + group),
        norm >= 0,
        query,
        start.to(tl.int64) + first_code,
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
