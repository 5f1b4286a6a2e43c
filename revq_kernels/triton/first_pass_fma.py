"""The first pass on CUDA cores: scores of all codes by float32 fused multiply-adds, for any card and any d.

    S = |c'|^2 + T - 2 x'.c'        with x' = (x - center) * scale and c' alike

A code costs a chain of d operations and a minimum.  No score of a finite code is negative, so their bits order as
integers do, and codes far out of range need no care: their norms outweigh the products.  A code that is not finite
scores infinity or NaN.  NVIDIA's arithmetic returns one NaN alone, 0x7fffffff, which as an integer is above every
score; where that is not known (INLINE_ASM is False) such a code is multiplied as zeros.

D <= REGISTER_DIMS keeps the queries' numbers in registers; otherwise a loop over DIM_STEP dimensions at a time reads
them again for each tile of codes.
"""

import triton
import triton.language as tl

from revq_kernels.triton import certificate
from revq_kernels.triton.addressing import query_rows
from revq_kernels.triton.lanes import NO_SCORE, emit_candidates, lane_minimum, minimum_of_three, update_lanes

_TRUSTED_NORM = tl.constexpr((certificate.RANGE / 4) ** 2)
_MULTIPLIED = tl.constexpr(2.0**60)  # beyond it a product could overflow, and an infinity less another is a NaN
_PAD = tl.constexpr(certificate.SCORE_PAD)


@triton.jit
def scaled(number, unit, offset):
    """(number - center) * unit, where offset = -center * unit: for a power of two, rounded once as that is."""
    return tl.fma(number.to(tl.float32), unit, offset)


@triton.jit
def squared_norm(row, stride, middle, unit, D: tl.constexpr, DIM_STEP: tl.constexpr):
    """|x'|^2 of each row."""
    norm = tl.zeros(row.shape, tl.float32)
    for dim in range(0, D, DIM_STEP):
        for j in tl.static_range(DIM_STEP):
            offset = -tl.load(middle + dim + j, mask=dim + j < D, other=0.0) * unit
            number = tl.load(row + (dim + j) * stride, mask=dim + j < D, other=0.0)
            number = scaled(number, unit, offset)
            norm = tl.fma(number, number, norm)
    return norm


@triton.jit
def register_scores(x_numbers, code, stride, offsets, unit, total, largest, D: tl.constexpr, INLINE_ASM: tl.constexpr):
    """Scores of a tile whose queries are in registers (as -2 x'), and the largest code norm so far, NaN above all.

    total: T, or infinity in columns past the last code.
    """
    numbers = ()
    for j in tl.static_range(D):
        numbers = numbers + (scaled(tl.load(code + j * stride), unit, offsets[j]),)  # noqa: RUF005 (Triton has no unpacking)
    norm = numbers[0] * numbers[0]
    for j in tl.static_range(1, D):
        norm = tl.fma(numbers[j], numbers[j], norm)
    score = (norm + total)[None, :]
    for j in tl.static_range(D):
        number = numbers[j] if INLINE_ASM else tl.where(norm < float("inf"), numbers[j], 0.0)
        score = tl.fma(x_numbers[j][:, None], number[None, :], score)
    return score, tl.maximum(largest, norm, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def long_scores(
    row, x_stride_d, code, stride, middle, unit, total, largest, D: tl.constexpr, DIM_STEP: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """The same for any D, the norm being added last."""
    norm = tl.zeros(code.shape, tl.float32)
    score = tl.zeros([row.shape[0], code.shape[0]], tl.float32)
    for dim in range(0, D, DIM_STEP):
        for j in tl.static_range(DIM_STEP):
            offset = -tl.load(middle + dim + j, mask=dim + j < D, other=0.0) * unit
            x_number = scaled(tl.load(row + j * x_stride_d, mask=dim + j < D, other=0.0), unit, offset)
            number = scaled(tl.load(code + j * stride, mask=dim + j < D, other=0.0), unit, offset)
            norm = tl.fma(number, number, norm)
            if not INLINE_ASM:
                number = tl.where(tl.abs(number) < _MULTIPLIED, number, 0.0)
            score = tl.fma(x_number[:, None], (-2 * number)[None, :], score)
        row += DIM_STEP * x_stride_d
        code += DIM_STEP * stride
    score += (norm + total)[None, :]
    return score, tl.maximum(largest, norm, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def cell_minima(
    row, x_stride_d, x_numbers, first_code, codebook_stride_k, codebook_stride_d, middle, offsets, unit, shift, left,
    largest, D: tl.constexpr, REGISTER_DIMS: tl.constexpr, DIM_STEP: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_CODES: tl.constexpr, CELL_TILES: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, E: tl.constexpr, INLINE_ASM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The smallest score of each lane over the CELL_TILES tiles at ``first_code``, int32 [BLOCK_QUERIES, A * C].

    WHOLE: all columns are codes; otherwise the first ``left`` are.
    """
    PAIRED: tl.constexpr = (B * E == 1) & (UNROLL % 2 == 0)
    column = tl.arange(0, BLOCK_CODES)
    cell = tl.full([BLOCK_QUERIES, A * C], NO_SCORE, tl.int32)
    code = first_code + column.to(tl.int64) * codebook_stride_k
    if PAIRED:
        even = cell
    advance = tl.full([BLOCK_CODES], BLOCK_CODES, tl.int64) * codebook_stride_k
    for tile in range(0, CELL_TILES, UNROLL):
        for u in tl.static_range(UNROLL):
            if WHOLE:
                total = shift
            else:
                # columns past the last code read that one again
                index = (tile + u) * BLOCK_CODES + column
                code = first_code + tl.minimum(index, left - 1).to(tl.int64) * codebook_stride_k
                total = tl.where(index < left, shift, float("inf"))
            if D <= REGISTER_DIMS:
                score, largest = register_scores(
                    x_numbers, code, codebook_stride_d, offsets, unit, total, largest, D, INLINE_ASM
                )
            else:
                score, largest = long_scores(
                    row, x_stride_d, code, codebook_stride_d, middle, unit, total, largest, D, DIM_STEP, INLINE_ASM
                )
            if WHOLE:
                code += advance
            bits = score.to(tl.int32, bitcast=True)
            if not PAIRED:
                cell = lane_minimum(cell, bits, A, B, C, E, INLINE_ASM)
            elif u % 2 == 0:
                even = bits
            else:
                cell = minimum_of_three(cell, even, bits, INLINE_ASM)
    return cell, largest


@triton.jit
def fma(
    x, inner, x_stride_outer, x_stride_inner, x_stride_g, x_stride_d,
    codebook, codebook_stride_g, codebook_stride_k, codebook_stride_d,
    center, scale, limit, found, unsettled, entry_score, entry_first, rows, num_groups, num_codes, codes_per_split,
    D: tl.constexpr, REGISTER_DIMS: tl.constexpr, DIM_STEP: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_CODES: tl.constexpr, CELL_TILES: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, E: tl.constexpr, ID_BITS: tl.constexpr, SLOTS: tl.constexpr, CERTIFICATE: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Program (q, s): block q mod ceil(rows / BLOCK_QUERIES) of a group's queries, the s-th codes_per_split codes.

    codes_per_split is a multiple of BLOCK_CODES * CELL_TILES, at most 2^ID_BITS times it.
    UNROLL (1 or even) divides CELL_TILES: so many tiles follow one another without a branch, and two minima share an
    instruction.  INLINE_ASM is False under the interpreter and on AMD.
    """
    query_blocks = tl.cdiv(rows, BLOCK_QUERIES)
    group = (tl.program_id(0) // query_blocks).to(tl.int64)
    n = tl.program_id(0) % query_blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    middle = center + group * D
    unit = tl.load(scale + group)
    row = query_rows(x, tl.minimum(n, rows - 1), group, inner, x_stride_outer, x_stride_inner, x_stride_g)
    x_numbers = ()
    offsets = ()
    if D <= REGISTER_DIMS:
        norm = tl.zeros([BLOCK_QUERIES], tl.float32)
        for j in tl.static_range(D):
            offset = -tl.load(middle + j) * unit
            number = scaled(tl.load(row + j * x_stride_d), unit, offset)
            norm = tl.fma(number, number, norm)
            offsets = offsets + (offset,)  # noqa: RUF005 (Triton has no unpacking)
            x_numbers = x_numbers + (-2 * number,)  # noqa: RUF005
    else:
        norm = squared_norm(row, x_stride_d, middle, unit, D, DIM_STEP)
    shift = tl.max(tl.where(norm <= _TRUSTED_NORM, norm, 0.0), axis=0) * (1 + _PAD) + _PAD

    start = tl.program_id(1).to(tl.int64) * codes_per_split
    count = tl.minimum(num_codes - start, codes_per_split).to(tl.int32)
    codes = codebook + group * codebook_stride_g
    best = tl.full([BLOCK_QUERIES, A * C], NO_SCORE, tl.int32)
    second = best
    third = best
    largest = tl.zeros([BLOCK_CODES], tl.float32)
    whole_steps = count // (BLOCK_CODES * CELL_TILES)
    for step in range(whole_steps):
        first_code = codes + (start + step * (BLOCK_CODES * CELL_TILES)) * codebook_stride_k
        cell, largest = cell_minima(
            row, x_stride_d, x_numbers, first_code, codebook_stride_k, codebook_stride_d, middle, offsets, unit, shift,
            0, largest, D, REGISTER_DIMS, DIM_STEP, UNROLL, BLOCK_QUERIES, BLOCK_CODES, CELL_TILES, A, B, C, E,
            INLINE_ASM, True,
        )  # fmt: skip
        best, second, third = update_lanes(best, second, third, cell, step, ID_BITS)
    left = count - whole_steps * (BLOCK_CODES * CELL_TILES)
    if left > 0:
        first_code = codes + (start + whole_steps * (BLOCK_CODES * CELL_TILES)) * codebook_stride_k
        cell, largest = cell_minima(
            row, x_stride_d, x_numbers, first_code, codebook_stride_k, codebook_stride_d, middle, offsets, unit, shift,
            left, largest, D, REGISTER_DIMS, DIM_STEP, 1, BLOCK_QUERIES, BLOCK_CODES, CELL_TILES, A, B, C, E,
            INLINE_ASM, False,
        )  # fmt: skip
        best, second, third = update_lanes(best, second, third, cell, whole_steps, ID_BITS)

    if D <= REGISTER_DIMS:
        # computed once more: kept across the loops, they would take the registers of a larger tile
        norm = tl.zeros([BLOCK_QUERIES], tl.float32)
        for j in tl.static_range(D):
            norm = tl.fma(x_numbers[j], x_numbers[j], norm)
        norm *= 0.25
    exists = n < rows
    query = n.to(tl.int64) * num_groups + group
    trusted = exists & (norm <= _TRUSTED_NORM)
    nan = tl.max((largest != largest).to(tl.int32), axis=0)
    doubtful = exists & ((trusted == 0) | (tl.zeros([BLOCK_QUERIES], tl.int32) + nan > 0))
    tl.store(unsettled + query, tl.full([BLOCK_QUERIES], 1, tl.int32), mask=doubtful)
    norm = tl.where(trusted, norm, 0.0)
    emit_candidates(
        best, second, third, norm, tl.zeros([BLOCK_QUERIES], tl.float32), shift, unit, trusted, query, start, limit,
        found, unsettled, entry_score, entry_first, CERTIFICATE, A, B, C, E, CELL_TILES, ID_BITS, SLOTS,
    )  # fmt: skip
