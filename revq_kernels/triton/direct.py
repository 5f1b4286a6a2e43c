"""Kernels around a first pass: `prepare` initializes the workspace, `direct_search` and `fallback` search all codes.

The direct form compares the query with all codes by the contract's exact distance (docs/design.md): every operation
rounded to float32, none fused, hence these two kernels must be launched with ``enable_fp_fusion=False``.  A NaN becomes
-1, which no distance is, so that plain comparisons of floats follow the contract's keys.  On NVIDIA cards (INLINE_ASM)
a maximum with -1 does that in one instruction, for a NaN of either sign and any payload.  Columns past the last code
read the last code again: their keys have its distance and a higher index, so they never win and need no mask.

D <= REGISTER_DIMS keeps the elements of the queries in registers; otherwise a loop over DIM_STEP dimensions at a time
loads them again for each tile of codes.  ``rows`` is the number of queries per group, below 2^31 - 2^16.
"""

# mypy: disable-error-code="assignment,misc"
# Triton unrolls loops over tuples, so that a variable holds tuples of several lengths.

import triton
import triton.language as tl

from revq_kernels.triton.addressing import query_rows

SAMPLES = 128
"""Codes per group, evenly spaced, that the center and the scale are computed from; reading all codes would be slow."""

NOT_SPECIALIZED = ("inner", "rows", "num_groups", "num_codes", "codes_per_split")
"""Sizes that change from call to call; specializing on their values would compile the kernel again and again."""


@triton.jit
def initialize_state(limit, entry_count, uncertified, key, first_query, num_states, BLOCK: tl.constexpr):
    """limit = inf, entry_count = uncertified = 0, key = the largest int64, for BLOCK queries."""
    query = first_query + tl.arange(0, BLOCK)
    valid = query < num_states
    tl.store(limit + query, tl.full([BLOCK], float("inf"), tl.float32), mask=valid)
    tl.store(entry_count + query, tl.zeros([BLOCK], tl.int32), mask=valid)
    tl.store(uncertified + query, tl.zeros([BLOCK], tl.int32), mask=valid)
    tl.store(key + query, tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64), mask=valid)


@triton.jit
def center_and_scale(
    codes,
    stride_k,
    stride_d,
    center,
    scale,
    num_codes,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """One group: codes [K, D] -> its center [D] (a mean) and its scale (a power of two).

    The nearest code does not change when query and codes are shifted and scaled alike, and low precision needs values
    of moderate size around zero.  The certificate holds for any center and scale; poor ones only send more queries to
    the fallback.
    """
    column = tl.arange(0, PADDED_D)
    samples = tl.minimum(num_codes, SAMPLES)
    stride_k = (num_codes // samples).to(tl.int64) * stride_k
    total = tl.zeros([PADDED_D], tl.float32)
    for start in range(0, samples, ROWS):
        sample = start + tl.arange(0, ROWS)
        valid = (sample < samples)[:, None] & (column < D)[None, :]
        code = codes + sample[:, None] * stride_k + column[None, :] * stride_d
        value = tl.load(code, mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(value, axis=0)
    mean = total / samples.to(tl.float32)
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)  # the comparison is false for a NaN too
    tl.store(center + column, mean, mask=column < D)

    spread = tl.zeros([ROWS], tl.float32)
    for start in range(0, samples, ROWS):
        sample = start + tl.arange(0, ROWS)
        valid = (sample < samples)[:, None] & (column < D)[None, :]
        code = codes + sample[:, None] * stride_k + column[None, :] * stride_d
        value = tl.load(code, mask=valid, other=0.0).to(tl.float32)
        value = tl.where(valid, value - mean[None, :], 0.0)
        largest = tl.max(tl.abs(value), axis=1)
        unit = value / tl.where(largest > 0, largest, 1.0)[:, None]  # so that squares neither overflow nor underflow
        norm = largest * tl.sqrt(tl.sum(unit * unit, axis=1))
        spread = tl.maximum(spread, tl.where(norm < float("inf"), norm, 0.0))
    exponent = ((tl.max(spread, axis=0).to(tl.int32, bitcast=True) >> 23) & 255) - 127
    power = tl.minimum(tl.maximum(5 - exponent, -100), 100)  # scales the largest norm of the sample into [32, 64)
    tl.store(scale, ((power + 127) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["num_states", "num_groups", "num_codes"])
def prepare(
    # codes [G, K, D]
    codebook,
    codebook_stride_g,
    codebook_stride_k,
    codebook_stride_d,
    # per group: float32 [G, D] and [G]
    center,
    scale,
    # the workspace, per query
    limit,
    entry_count,
    uncertified,
    key,
    # sizes
    num_states,
    num_groups,
    num_codes,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    STATES: tl.constexpr,
):
    """Program p initializes the state of STATES queries and, if p < G, computes center and scale of group p."""
    pid = tl.program_id(0).to(tl.int64)
    initialize_state(limit, entry_count, uncertified, key, pid * STATES, num_states, STATES)
    if pid < num_groups:
        center_and_scale(
            codebook + pid * codebook_stride_g,
            codebook_stride_k,
            codebook_stride_d,
            center + pid * D,
            scale + pid,
            num_codes,
            D,
            PADDED_D,
            ROWS,
            SAMPLES,
        )


@triton.jit
def first_elements(row, stride, COUNT: tl.constexpr):
    """The first COUNT elements of each row: a tuple of float32 tensors."""
    values = ()
    for j in tl.static_range(COUNT):
        values = values + (tl.load(row + j * stride).to(tl.float32),)  # noqa: RUF005 (Triton has no unpacking)
    return values


@triton.jit
def smallest_key(
    row,
    x_stride_d,
    codes,
    codebook_stride_k,
    codebook_stride_d,
    start,
    stop,
    last_code,
    D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    REGISTER_DIMS: tl.constexpr,
    DIM_STEP: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """The smallest key over codes ``start`` <= k < ``stop`` (int64) for each query at ``row``."""
    column = tl.arange(0, BLOCK_CODES)
    best = tl.full([BLOCK_QUERIES, BLOCK_CODES], float("inf"), tl.float32)
    best_tile = tl.zeros([BLOCK_QUERIES, BLOCK_CODES], tl.int32)
    if D <= REGISTER_DIMS:
        x_values = first_elements(row, x_stride_d, D)
    for tile in range(tl.cdiv(stop - start, BLOCK_CODES).to(tl.int32)):
        first = start + tile * BLOCK_CODES
        inside = tl.minimum(column, tl.minimum(last_code - first, BLOCK_CODES - 1).to(tl.int32))
        code = codes + first * codebook_stride_k + inside.to(tl.int64) * codebook_stride_k
        # 0 plus a square is that square: the first dimension needs no special case
        total = tl.zeros([BLOCK_QUERIES, BLOCK_CODES], tl.float32)
        if D <= REGISTER_DIMS:
            for j in tl.static_range(D):
                difference = x_values[j][:, None] - tl.load(code + j * codebook_stride_d).to(tl.float32)[None, :]
                total = difference * difference if j == 0 else total + difference * difference
        else:
            row_now = row
            for dim in range(0, D, DIM_STEP):
                for j in tl.static_range(DIM_STEP):
                    # past the last dimension both values are 0, and adding 0 is exact
                    x_value = tl.load(row_now + j * x_stride_d, mask=dim + j < D, other=0.0).to(tl.float32)
                    code_value = tl.load(code + j * codebook_stride_d, mask=dim + j < D, other=0.0).to(tl.float32)
                    difference = x_value[:, None] - code_value[None, :]
                    total += difference * difference
                row_now += DIM_STEP * x_stride_d
                code += DIM_STEP * codebook_stride_d
        # on other hardware than NVIDIA's the maximum of a NaN and -1 may be the NaN
        total = tl.maximum(total, -1.0) if INLINE_ASM else tl.where(total == total, total, -1.0)
        best_tile = tl.where(total < best, tile, best_tile)
        best = tl.minimum(best, total)
    bits = tl.where(best < 0, -1, best.to(tl.int32, bitcast=True))
    index = start + best_tile.to(tl.int64) * BLOCK_CODES + column[None, :]
    return tl.min((bits.to(tl.int64) << 32) | index, axis=1)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def direct_search(
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
    # result int64 [N, G]
    key,
    # sizes
    rows,
    num_groups,
    num_codes,
    codes_per_split,
    D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    REGISTER_DIMS: tl.constexpr,
    DIM_STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """Grid (groups * query blocks, splits): ``key[n * G + g]`` becomes the smallest key.

    SPLIT: whether there is more than one split; ``key`` must then hold the largest int64 before the launch.
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
            row,
            x_stride_d,
            codes,
            codebook_stride_k,
            codebook_stride_d,
            start,
            stop,
            num_codes - 1,
            D,
            BLOCK_QUERIES,
            BLOCK_CODES,
            REGISTER_DIMS,
            DIM_STEP,
            INLINE_ASM,
        )
        target = key + n.to(tl.int64) * num_groups + group
        if SPLIT:
            tl.atomic_min(target, smallest, mask=n < rows, sem="relaxed")
        else:
            tl.store(target, smallest, mask=n < rows)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def fallback(
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
    # the workspace, per query
    limit,
    entry_count,
    uncertified,
    key,
    # sizes
    rows,
    num_groups,
    num_codes,
    codes_per_split,
    D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    REGISTER_DIMS: tl.constexpr,
    DIM_STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    FLAG_BLOCK: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """Grid (groups * flag blocks, splits): lowers the keys of the queries without a certificate.

    A program reads the flags of FLAG_BLOCK queries and searches for the uncertified ones, BLOCK_QUERIES at a time.
    """
    flag_blocks = tl.cdiv(rows, FLAG_BLOCK)
    group = (tl.program_id(0) // flag_blocks).to(tl.int64)
    n = tl.program_id(0) % flag_blocks * FLAG_BLOCK + tl.arange(0, FLAG_BLOCK)
    query = n.to(tl.int64) * num_groups + group
    waiting = tl.load(uncertified + query, mask=n < rows, other=0) != 0
    waiting |= tl.load(entry_count + query, mask=n < rows, other=0) > SLOTS
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
                row,
                x_stride_d,
                codes,
                codebook_stride_k,
                codebook_stride_d,
                start,
                stop,
                num_codes - 1,
                D,
                BLOCK_QUERIES,
                BLOCK_CODES,
                REGISTER_DIMS,
                DIM_STEP,
                INLINE_ASM,
            )
            tl.atomic_min(key + picked.to(tl.int64) * num_groups + group, smallest, mask=turn < count, sem="relaxed")
