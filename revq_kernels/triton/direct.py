"""The direct form: D of the contract over codes, every operation rounded to float32, none fused.

Both kernels must be launched with ``enable_fp_fusion=False``.  A NaN becomes -1, which no distance is: plain comparisons
of floats then follow the contract's keys.  On NVIDIA's cards (INLINE_ASM) a maximum with -1 does that in one instruction,
for a NaN of either sign and any payload.  Columns past the last code read the last code again: their keys have its
distance and a higher index, so they never win and need no mask.

D <= REGISTER_DIMS keeps the queries' numbers in registers; otherwise a loop over DIM_STEP dimensions at a time reads
them again for each tile of codes.  ``rows`` is the number of queries per group, below 2^31 - 2^16.
"""

import triton
import triton.language as tl

from revq_kernels.triton.addressing import query_rows

NOT_SPECIALIZED = ("inner", "rows", "num_groups", "num_codes", "codes_per_split")
"""Sizes that change from call to call: a kernel compiled for one value would be compiled again for the next."""


@triton.jit
def first_numbers(row, stride, COUNT: tl.constexpr):
    """The first COUNT numbers of each row: a tuple of float32 tensors."""
    numbers = ()
    for j in tl.static_range(COUNT):
        numbers = numbers + (tl.load(row + j * stride).to(tl.float32),)  # noqa: RUF005 (Triton has no unpacking)
    return numbers


@triton.jit
def smallest_key(
    row, x_stride_d, codes, codebook_stride_k, codebook_stride_d, start, stop, last_code,
    D: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_CODES: tl.constexpr, REGISTER_DIMS: tl.constexpr,
    DIM_STEP: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """The smallest key over codes ``start`` <= k < ``stop`` (int64) for each query at ``row``."""
    column = tl.arange(0, BLOCK_CODES)
    best = tl.full([BLOCK_QUERIES, BLOCK_CODES], float("inf"), tl.float32)
    best_tile = tl.zeros([BLOCK_QUERIES, BLOCK_CODES], tl.int32)
    if D <= REGISTER_DIMS:
        x_numbers = first_numbers(row, x_stride_d, D)
    for tile in range(tl.cdiv(stop - start, BLOCK_CODES).to(tl.int32)):
        first = start + tile * BLOCK_CODES
        inside = tl.minimum(column, tl.minimum(last_code - first, BLOCK_CODES - 1).to(tl.int32))
        code = codes + first * codebook_stride_k + inside.to(tl.int64) * codebook_stride_k
        # 0 + a square is that square: the first dimension needs no case of its own
        total = tl.zeros([BLOCK_QUERIES, BLOCK_CODES], tl.float32)
        if D <= REGISTER_DIMS:
            for j in tl.static_range(D):
                difference = x_numbers[j][:, None] - tl.load(code + j * codebook_stride_d).to(tl.float32)[None, :]
                total = difference * difference if j == 0 else total + difference * difference
        else:
            row_now = row
            for dim in range(0, D, DIM_STEP):
                for j in tl.static_range(DIM_STEP):
                    # past the last dimension both read 0, which changes no bit
                    x_number = tl.load(row_now + j * x_stride_d, mask=dim + j < D, other=0.0).to(tl.float32)
                    number = tl.load(code + j * codebook_stride_d, mask=dim + j < D, other=0.0).to(tl.float32)
                    difference = x_number[:, None] - number[None, :]
                    total += difference * difference
                row_now += DIM_STEP * x_stride_d
                code += DIM_STEP * codebook_stride_d
        # elsewhere than on NVIDIA's cards a maximum might be the NaN
        total = tl.maximum(total, -1.0) if INLINE_ASM else tl.where(total == total, total, -1.0)
        best_tile = tl.where(total < best, tile, best_tile)
        best = tl.minimum(best, total)
    bits = tl.where(best < 0, -1, best.to(tl.int32, bitcast=True))
    index = start + best_tile.to(tl.int64) * BLOCK_CODES + column[None, :]
    return tl.min((bits.to(tl.int64) << 32) | index, axis=1)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def direct_search(
    x, inner, x_stride_outer, x_stride_inner, x_stride_g, x_stride_d,
    codebook, codebook_stride_g, codebook_stride_k, codebook_stride_d,
    key, rows, num_groups, num_codes, codes_per_split,
    D: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_CODES: tl.constexpr, REGISTER_DIMS: tl.constexpr,
    DIM_STEP: tl.constexpr, SPLIT: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Grid (groups * query blocks, splits): ``key[n * G + g]`` becomes the smallest key.

    SPLIT: whether there is more than one split; ``key`` then holds the largest int64 before.
    """
    query_blocks = tl.cdiv(rows, BLOCK_QUERIES)
    group = (tl.program_id(0) // query_blocks).to(tl.int64)
    n = tl.program_id(0) % query_blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    start = tl.program_id(1).to(tl.int64) * codes_per_split
    stop = tl.minimum(start + codes_per_split, num_codes)
    if start < stop:
        row = query_rows(x, tl.minimum(n, rows - 1), group, inner, x_stride_outer, x_stride_inner, x_stride_g)
        codes = codebook + group * codebook_stride_g
        smallest = smallest_key(
            row, x_stride_d, codes, codebook_stride_k, codebook_stride_d, start, stop, num_codes - 1,
            D, BLOCK_QUERIES, BLOCK_CODES, REGISTER_DIMS, DIM_STEP, INLINE_ASM,
        )  # fmt: skip
        target = key + n.to(tl.int64) * num_groups + group
        if SPLIT:
            tl.atomic_min(target, smallest, mask=n < rows, sem="relaxed")
        else:
            tl.store(target, smallest, mask=n < rows)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def fallback(
    x, inner, x_stride_outer, x_stride_inner, x_stride_g, x_stride_d,
    codebook, codebook_stride_g, codebook_stride_k, codebook_stride_d,
    limit, found, unsettled, key, rows, num_groups, num_codes, codes_per_split,
    D: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_CODES: tl.constexpr, REGISTER_DIMS: tl.constexpr,
    DIM_STEP: tl.constexpr, SLOTS: tl.constexpr, FLAG_BLOCK: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Grid (groups * flag blocks, splits): lowers the keys of the queries that the first pass did not settle.

    A program reads the flags of FLAG_BLOCK queries and takes the unsettled ones BLOCK_QUERIES at a time.
    """
    flag_blocks = tl.cdiv(rows, FLAG_BLOCK)
    group = (tl.program_id(0) // flag_blocks).to(tl.int64)
    n = tl.program_id(0) % flag_blocks * FLAG_BLOCK + tl.arange(0, FLAG_BLOCK)
    query = n.to(tl.int64) * num_groups + group
    waiting = tl.load(unsettled + query, mask=n < rows, other=0) != 0
    waiting |= tl.load(found + query, mask=n < rows, other=0) > SLOTS
    waiting |= tl.load(limit + query, mask=n < rows, other=0.0) == float("inf")
    count = tl.sum(waiting.to(tl.int32), axis=0)
    start = tl.program_id(1).to(tl.int64) * codes_per_split
    stop = tl.minimum(start + codes_per_split, num_codes)
    if (count > 0) & (start < stop):
        rank = tl.where(waiting, tl.cumsum(waiting.to(tl.int32), axis=0) - 1, -1)
        codes = codebook + group * codebook_stride_g
        for taken in range(0, count, BLOCK_QUERIES):
            # rows past the count repeat query 0 and write nothing
            turn = taken + tl.arange(0, BLOCK_QUERIES)
            picked = tl.sum(tl.where(rank[None, :] == turn[:, None], n[None, :], 0), axis=1)
            row = query_rows(x, picked, group, inner, x_stride_outer, x_stride_inner, x_stride_g)
            smallest = smallest_key(
                row, x_stride_d, codes, codebook_stride_k, codebook_stride_d, start, stop, num_codes - 1,
                D, BLOCK_QUERIES, BLOCK_CODES, REGISTER_DIMS, DIM_STEP, INLINE_ASM,
            )  # fmt: skip
            tl.atomic_min(key + picked.to(tl.int64) * num_groups + group, smallest, mask=turn < count, sem="relaxed")
