"""After a first pass: D over each query's candidates, then its index, its row and its count.

D is the contract's distance (docs/design.md): every operation rounded to float32, in index order, nothing fused.
"""

import triton
import triton.language as tl

from revq_kernels.triton.addressing import query_rows

MAX_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)
SLOTS_AT_ONCE = tl.constexpr(16)


@triton.jit
def distance_key(distance, index):
    """The contract's key: NaN before every number, then the distance, then the index."""
    bits = tl.where(distance != distance, -1, distance.to(tl.int32, bitcast=True))
    return (bits.to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def cell_distance(row, x_stride_d, code, codebook_stride_d, used, valid, D: tl.constexpr):
    """D between the rows [Q] and their own codes [Q, M]."""
    distance = tl.zeros(code.shape, tl.float32)
    for j in range(D):
        value = tl.load(row + j * x_stride_d, mask=used, other=0.0).to(tl.float32)
        number = tl.load(code + j * codebook_stride_d, mask=valid, other=0.0).to(tl.float32)
        difference = value[:, None] - number
        distance += difference * difference  # the first sum adds a square to 0, which changes no bit
    return distance


@triton.jit
def rounded_to(number, dtype: tl.constexpr):
    """A float32 tensor in ``dtype``, to nearest even: Triton's interpreter would cut off the low bits of a bfloat16."""
    if dtype == tl.bfloat16:
        bits = number.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        number = tl.where(number == number, nearest, number)
    return number.to(dtype)


@triton.jit(do_not_specialize=["rows", "num_groups", "num_codes", "inner"])
def settle(
    x, inner, x_stride_outer, x_stride_inner, x_stride_g, x_stride_d,
    codebook, codebook_stride_g, codebook_stride_k, codebook_stride_d,
    limit, found, unsettled, key, entry_score, entry_first, indices, quantized, count, rows, num_groups, num_codes,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_CODES: tl.constexpr,
    CELL_TILES: tl.constexpr, B: tl.constexpr, C: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr,
    CANDIDATES: tl.constexpr, QUANTIZE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Program p finishes BLOCK_QUERIES queries of group p mod G.

    CANDIDATES: False when ``key`` already holds every answer (the direct form).  indices int64 [N, G], quantized
    [N, G, D] and count int64 [G, K] are contiguous.  Settled queries read their entries, all others their key.
    """
    g = (tl.program_id(0) % num_groups).to(tl.int64)
    n = tl.program_id(0) // num_groups * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    real = n < rows
    query = n.to(tl.int64) * num_groups + g
    codes = codebook + g * codebook_stride_g
    best = tl.load(key + query, mask=real, other=MAX_KEY)
    if CANDIDATES:
        reach = tl.load(limit + query, mask=real, other=0.0)
        entries = tl.load(found + query, mask=real, other=0)
        settled = real & (tl.load(unsettled + query, mask=real, other=1) == 0)
        settled = settled & (reach < float("inf")) & (entries <= SLOTS)
        entries = tl.where(settled, entries, 0)
        row = query_rows(x, n, g, inner, x_stride_outer, x_stride_inner, x_stride_g)
        member = tl.arange(0, CELL_TILES * B * E)
        offset = member // (B * E) * BLOCK_CODES + member // E % B * (C * E) + member % E
        listed = tl.max(entries, axis=0)
        place = tl.arange(0, SLOTS_AT_ONCE)
        for chunk in range(0, listed, SLOTS_AT_ONCE):
            # many splits list many cells, of which few are within the limit that all splits found together
            slots = chunk + place
            near = slots[None, :] < entries[:, None]
            scores = tl.load(entry_score + query[:, None] * SLOTS + slots[None, :], mask=near, other=float("inf"))
            near = near & (scores <= reach[:, None])
            wanted = tl.max(near.to(tl.int32), axis=0)
            for slot in range(chunk, tl.minimum(chunk + SLOTS_AT_ONCE, listed)):
                if tl.sum(tl.where(slots == slot, wanted, 0), axis=0) > 0:
                    used = tl.max((near & (slots[None, :] == slot)).to(tl.int32), axis=1) > 0
                    first = tl.load(entry_first + query * SLOTS + slot, mask=used, other=0)
                    k = first.to(tl.int64)[:, None] + offset[None, :]
                    valid = used[:, None] & (k < num_codes)
                    code = codes + k * codebook_stride_k
                    distance = cell_distance(row, x_stride_d, code, codebook_stride_d, used, valid, D)
                    candidate = tl.where(valid, distance_key(distance, k), MAX_KEY)
                    best = tl.minimum(best, tl.min(candidate, axis=1))
    index = best & 0xFFFFFFFF
    tl.store(indices + query, index, mask=real)
    if COUNT:
        one = tl.full([BLOCK_QUERIES], 1, tl.int64)
        tl.atomic_add(count + g * num_codes + index, one, mask=real, sem="relaxed")
    if QUANTIZE:
        for start in range(0, D, PADDED_D):
            column = start + tl.arange(0, PADDED_D)
            valid = real[:, None] & (column < D)[None, :]
            number = tl.load(
                codes + index[:, None] * codebook_stride_k + column[None, :] * codebook_stride_d, mask=valid, other=0.0
            )
            number = rounded_to(number.to(tl.float32), quantized.dtype.element_ty)
            tl.store(quantized + query[:, None] * D + column[None, :], number, mask=valid)
