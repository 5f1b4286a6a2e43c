"""The first pass on CUDA cores: scores of all codes by float32 fused multiply-adds, for any card and any d.

    S = |c'|^2 + T - 2 x'.c'        with x' = (x - center) * scale and c' alike

One code costs a chain of d operations and a minimum.  No score of a finite code is negative, so their bits order as
integers do.  Codes far out of range need no special case: their norms outweigh the products.  The score of a code that
is not finite is infinity or NaN.  NVIDIA's arithmetic returns the NaN 0x7fffffff only, which as an integer is above
every score; on other hardware (INLINE_ASM is False) such a code is multiplied as zeros instead.

D <= REGISTER_DIMS keeps the elements of the queries in registers; otherwise a loop over DIM_STEP dimensions at a time
loads them again for each tile of codes.
"""

# mypy: disable-error-code="assignment,misc"
# Triton unrolls loops over tuples, so that a variable holds tuples of several lengths.

import triton
import triton.language as tl

from revq_kernels.triton import certificate
from revq_kernels.triton.addressing import query_rows
from revq_kernels.triton.candidates import NO_SCORE, lane_minimum, list_candidates, minimum_of_three, update_lanes

_LARGEST_NORM = tl.constexpr((certificate.RANGE / 4) ** 2)
_LARGEST_FACTOR = tl.constexpr(2.0**60)  # larger factors could make products overflow, and infinity - infinity a NaN
_PAD = tl.constexpr(certificate.SCORE_PAD)


@triton.jit
def scaled(value, group_scale, offset):
    """(value - center) * scale, where offset = -center * scale; rounds once, as scale is a power of two."""
    return tl.fma(value.to(tl.float32), group_scale, offset)


@triton.jit
def squared_norm(row, stride, group_center, group_scale, D: tl.constexpr, DIM_STEP: tl.constexpr):
    """|x'|^2 of each row."""
    norm = tl.zeros(row.shape, tl.float32)
    for dim in range(0, D, DIM_STEP):
        for j in tl.static_range(DIM_STEP):
            offset = -tl.load(group_center + dim + j, mask=dim + j < D, other=0.0) * group_scale
            value = tl.load(row + (dim + j) * stride, mask=dim + j < D, other=0.0)
            value = scaled(value, group_scale, offset)
            norm = tl.fma(value, value, norm)
    return norm


@triton.jit
def register_scores(
    x_values,
    code,
    stride,
    offsets,
    group_scale,
    total,
    largest,
    D: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """(scores of a tile, the largest norm of a code so far); x_values: -2 x', one tensor per dimension.

    total: T, or infinity in columns past the last code.  ``largest`` becomes NaN once a norm is NaN.
    """
    values = ()
    for j in tl.static_range(D):
        value = scaled(tl.load(code + j * stride), group_scale, offsets[j])
        values = values + (value,)  # noqa: RUF005 (Triton has no unpacking)
    norm = values[0] * values[0]
    for j in tl.static_range(1, D):
        norm = tl.fma(values[j], values[j], norm)
    score = (norm + total)[None, :]
    for j in tl.static_range(D):
        value = values[j] if INLINE_ASM else tl.where(norm < float("inf"), values[j], 0.0)
        score = tl.fma(x_values[j][:, None], value[None, :], score)
    return score, tl.maximum(largest, norm, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def loaded_scores(
    row,
    x_stride_d,
    code,
    stride,
    group_center,
    group_scale,
    total,
    largest,
    D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """As `register_scores` for any D: loads the queries again, and adds the norm last."""
    norm = tl.zeros(code.shape, tl.float32)
    score = tl.zeros([row.shape[0], code.shape[0]], tl.float32)
    for dim in range(0, D, DIM_STEP):
        for j in tl.static_range(DIM_STEP):
            offset = -tl.load(group_center + dim + j, mask=dim + j < D, other=0.0) * group_scale
            x_value = scaled(tl.load(row + j * x_stride_d, mask=dim + j < D, other=0.0), group_scale, offset)
            value = scaled(tl.load(code + j * stride, mask=dim + j < D, other=0.0), group_scale, offset)
            norm = tl.fma(value, value, norm)
            if not INLINE_ASM:
                value = tl.where(tl.abs(value) < _LARGEST_FACTOR, value, 0.0)
            score = tl.fma(x_value[:, None], (-2 * value)[None, :], score)
        row += DIM_STEP * x_stride_d
        code += DIM_STEP * stride
    score += (norm + total)[None, :]
    return score, tl.maximum(largest, norm, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def cell_minima(
    # queries: pointers to their rows, or -2 x' in registers
    row,
    x_stride_d,
    x_values,
    # codes
    first_code,
    codebook_stride_k,
    codebook_stride_d,
    group_center,
    offsets,
    group_scale,
    shift,
    left,
    largest,
    D: tl.constexpr,
    REGISTER_DIMS: tl.constexpr,
    DIM_STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    CELL_TILES: tl.constexpr,
    OUTER_LANES: tl.constexpr,
    OUTER_MEMBERS: tl.constexpr,
    INNER_LANES: tl.constexpr,
    INNER_MEMBERS: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(the smallest score of each lane over the CELL_TILES tiles at ``first_code``, int32 [Q, lanes]; largest norm).

    WHOLE: all columns are codes; otherwise only the first ``left`` are.
    """
    PAIRED: tl.constexpr = (OUTER_MEMBERS * INNER_MEMBERS == 1) & (UNROLL % 2 == 0)
    column = tl.arange(0, BLOCK_CODES)
    cell = tl.full([BLOCK_QUERIES, OUTER_LANES * INNER_LANES], NO_SCORE, tl.int32)
    code = first_code + column.to(tl.int64) * codebook_stride_k
    if PAIRED:
        even = cell
    advance = tl.full([BLOCK_CODES], BLOCK_CODES, tl.int64) * codebook_stride_k
    for tile in range(0, CELL_TILES, UNROLL):
        for u in tl.static_range(UNROLL):
            if WHOLE:
                total = shift
            else:
                # columns past the last code read the last code again
                index = (tile + u) * BLOCK_CODES + column
                code = first_code + tl.minimum(index, left - 1).to(tl.int64) * codebook_stride_k
                total = tl.where(index < left, shift, float("inf"))
            if D <= REGISTER_DIMS:
                score, largest = register_scores(
                    x_values, code, codebook_stride_d, offsets, group_scale, total, largest, D, INLINE_ASM
                )
            else:
                score, largest = loaded_scores(
                    row,
                    x_stride_d,
                    code,
                    codebook_stride_d,
                    group_center,
                    group_scale,
                    total,
                    largest,
                    D,
                    DIM_STEP,
                    INLINE_ASM,
                )
            if WHOLE:
                code += advance
            bits = score.to(tl.int32, bitcast=True)
            if not PAIRED:
                cell = lane_minimum(cell, bits, OUTER_LANES, OUTER_MEMBERS, INNER_LANES, INNER_MEMBERS, INLINE_ASM)
            elif u % 2 == 0:
                even = bits
            else:
                cell = minimum_of_three(cell, even, bits, INLINE_ASM)
    return cell, largest


@triton.jit
def first_pass_fma(
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
    # the scores
    D: tl.constexpr,
    REGISTER_DIMS: tl.constexpr,
    DIM_STEP: tl.constexpr,
    UNROLL: tl.constexpr,
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
    INLINE_ASM: tl.constexpr,
):
    """Program (q, s): block q mod ceil(rows / BLOCK_QUERIES) of a group's queries, the s-th codes_per_split codes.

    codes_per_split is a multiple of BLOCK_CODES * CELL_TILES, at most 2^ID_BITS times it.  UNROLL (1 or even) divides
    CELL_TILES: as many tiles follow one another without a branch, and an even number lets two minima share one
    instruction.  INLINE_ASM is False in the interpreter and on AMD.
    """
    query_blocks = tl.cdiv(rows, BLOCK_QUERIES)
    group = (tl.program_id(0) // query_blocks).to(tl.int64)
    n = tl.program_id(0) % query_blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    group_center = center + group * D
    group_scale = tl.load(scale + group)
    row = query_rows(x, tl.minimum(n, rows - 1), group, inner, x_stride_outer, x_stride_inner, x_stride_g)
    x_values = ()
    offsets = ()
    if D <= REGISTER_DIMS:
        norm = tl.zeros([BLOCK_QUERIES], tl.float32)
        for j in tl.static_range(D):
            offset = -tl.load(group_center + j) * group_scale
            value = scaled(tl.load(row + j * x_stride_d), group_scale, offset)
            norm = tl.fma(value, value, norm)
            offsets = offsets + (offset,)  # noqa: RUF005 (Triton has no unpacking)
            x_values = x_values + (-2 * value,)  # noqa: RUF005
    else:
        norm = squared_norm(row, x_stride_d, group_center, group_scale, D, DIM_STEP)
    shift = tl.max(tl.where(norm <= _LARGEST_NORM, norm, 0.0), axis=0) * (1 + _PAD) + _PAD

    start = tl.program_id(1).to(tl.int64) * codes_per_split
    count = tl.minimum(num_codes - start, codes_per_split).to(tl.int32)
    codes = codebook + group * codebook_stride_g
    best = tl.full([BLOCK_QUERIES, OUTER_LANES * INNER_LANES], NO_SCORE, tl.int32)
    second = best
    third = best
    largest = tl.zeros([BLOCK_CODES], tl.float32)
    whole_steps = count // (BLOCK_CODES * CELL_TILES)
    for step in range(whole_steps):
        first_code = codes + (start + step * (BLOCK_CODES * CELL_TILES)) * codebook_stride_k
        cell, largest = cell_minima(
            row,
            x_stride_d,
            x_values,
            first_code,
            codebook_stride_k,
            codebook_stride_d,
            group_center,
            offsets,
            group_scale,
            shift,
            0,
            largest,
            D,
            REGISTER_DIMS,
            DIM_STEP,
            UNROLL,
            BLOCK_QUERIES,
            BLOCK_CODES,
            CELL_TILES,
            OUTER_LANES,
            OUTER_MEMBERS,
            INNER_LANES,
            INNER_MEMBERS,
            INLINE_ASM,
            WHOLE=True,
        )
        best, second, third = update_lanes(best, second, third, cell, step, ID_BITS)
    left = count - whole_steps * (BLOCK_CODES * CELL_TILES)
    if left > 0:
        first_code = codes + (start + whole_steps * (BLOCK_CODES * CELL_TILES)) * codebook_stride_k
        cell, largest = cell_minima(
            row,
            x_stride_d,
            x_values,
            first_code,
            codebook_stride_k,
            codebook_stride_d,
            group_center,
            offsets,
            group_scale,
            shift,
            left,
            largest,
            D,
            REGISTER_DIMS,
            DIM_STEP,
            1,
            BLOCK_QUERIES,
            BLOCK_CODES,
            CELL_TILES,
            OUTER_LANES,
            OUTER_MEMBERS,
            INNER_LANES,
            INNER_MEMBERS,
            INLINE_ASM,
            WHOLE=False,
        )
        best, second, third = update_lanes(best, second, third, cell, whole_steps, ID_BITS)

    if D <= REGISTER_DIMS:
        # computed again, because keeping the norm across the loops would take the registers of a larger tile
        norm = tl.zeros([BLOCK_QUERIES], tl.float32)
        for j in tl.static_range(D):
            norm = tl.fma(x_values[j], x_values[j], norm)
        norm *= 0.25
    exists = n < rows
    query = n.to(tl.int64) * num_groups + group
    in_range = exists & (norm <= _LARGEST_NORM)
    nan = tl.max((largest != largest).to(tl.int32), axis=0)
    excluded = exists & ((in_range == 0) | (tl.zeros([BLOCK_QUERIES], tl.int32) + nan > 0))
    tl.store(uncertified + query, tl.full([BLOCK_QUERIES], 1, tl.int32), mask=excluded)
    norm = tl.where(in_range, norm, 0.0)
    list_candidates(
        best,
        second,
        third,
        norm,
        tl.zeros([BLOCK_QUERIES], tl.float32),
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
