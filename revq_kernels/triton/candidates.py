"""Candidates of a search: the first passes collect them in lanes and list them, `rerank` computes their exact distance.

Collecting.  The columns of a tile of codes are numbered
``((outer_lane * OUTER_MEMBERS + outer_member) * INNER_LANES + inner_lane) * INNER_MEMBERS + inner_member``.
A *lane* is the pair (outer_lane, inner_lane), numbered ``outer_lane * INNER_LANES + inner_lane``.  A *step* is
CELL_TILES consecutive tiles, and a *cell* is one lane over one step.  Scores are positive float32, whose bits order as
the floats do, so all comparisons are of int32.  For every query and lane, a program keeps the three smallest cells,
each as one *entry*: the smallest score of the cell, with the low ID_BITS replaced by the number of the step.  No index
of a code is carried through the loop; `rerank` finds it by computing the exact distance to the few codes of each cell.

An initial codebook drawn from the data has many duplicate codes.  Three cells per lane rather than one, because a
duplicate of the nearest code lies in another lane, or in another cell of the same lane, and is then listed as well.
Only a query whose third cell in some lane is within its limit may miss a candidate, and is left to the fallback.

Reranking.  The exact distance is the contract's (docs/design.md): every operation rounded to float32, in index order,
without fused multiply-adds.
"""

# mypy: disable-error-code="assignment,misc"
# Triton unrolls loops over tuples, so that a variable holds tuples of several lengths.

import triton
import triton.language as tl

from revq_kernels.triton.addressing import query_rows
from revq_kernels.triton.certificate import certify, distance_below

NO_SCORE = tl.constexpr(0x7EFFFFFF)
"""The bits of a finite float above every score."""

MAX_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)
SLOTS_AT_ONCE = tl.constexpr(16)


@triton.jit
def minimum_of_three(a, b, c, INLINE_ASM: tl.constexpr):
    """The smallest of three int32; ptxas compiles the inline form to one instruction where the card has it."""
    if INLINE_ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 t; min.s32 t, $1, $2; min.s32 $0, t, $3; }",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return tl.minimum(tl.minimum(a, b), c)


@triton.jit
def lane_minimum(
    cell,
    bits,
    OUTER_LANES: tl.constexpr,
    OUTER_MEMBERS: tl.constexpr,
    INNER_LANES: tl.constexpr,
    INNER_MEMBERS: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """cell int32 [Q, lanes], lowered to the smallest of the tile's scores in each lane; bits: int32 [Q, columns]."""
    LANES: tl.constexpr = OUTER_LANES * INNER_LANES
    MEMBERS: tl.constexpr = OUTER_MEMBERS * INNER_MEMBERS
    columns = tl.reshape(bits, [bits.shape[0], OUTER_LANES, OUTER_MEMBERS, INNER_LANES, INNER_MEMBERS])
    members = tl.permute(columns, [0, 1, 3, 2, 4])
    pieces = (tl.reshape(members, [bits.shape[0], LANES, MEMBERS]),)
    LEVELS: tl.constexpr = (MEMBERS >= 2) + (MEMBERS >= 4) + (MEMBERS >= 8) + (MEMBERS >= 16) + (MEMBERS >= 32)
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(2**level):
            even, odd = tl.split(tl.reshape(pieces[i], [bits.shape[0], LANES, MEMBERS // 2 ** (level + 1), 2]))
            halves = halves + (even, odd)  # noqa: RUF005 (Triton has no unpacking)
        pieces = halves
    if MEMBERS == 1:
        cell = tl.minimum(cell, tl.reshape(pieces[0], cell.shape))
    for i in tl.static_range(MEMBERS // 2):
        left, right = tl.reshape(pieces[2 * i], cell.shape), tl.reshape(pieces[2 * i + 1], cell.shape)
        cell = minimum_of_three(cell, left, right, INLINE_ASM)
    return cell


@triton.jit
def update_lanes(best, second, third, cell, step, ID_BITS: tl.constexpr):
    """The three smallest entries of each lane, after the cells of one step (int32 bits of scores) were added."""
    entry = (cell & (-1 << ID_BITS)) | step
    third = tl.minimum(third, tl.maximum(second, entry))
    second = tl.minimum(second, tl.maximum(best, entry))
    return tl.minimum(best, entry), second, third


@triton.jit
def _entry_distance(entry, offset, ID_BITS: tl.constexpr):
    """The squared distance that an entry stands for, rounded down."""
    return distance_below((entry & (-1 << ID_BITS)).to(tl.float32, bitcast=True), offset)


@triton.jit
def list_candidates(
    # entries of each lane, int32 [Q, lanes]
    best,
    second,
    third,
    # per query [Q]: |x_h|^2 and |x' - x_h|^2 of the vectors that were multiplied
    norm,
    error,
    # scalars: T of the scores, the scale of the group
    shift,
    scale,
    # bool [Q]: queries that exist and are in range; int64 [Q]: their numbers n * G + g; the program's first code
    in_range,
    query,
    start,
    # the workspace, per query
    limit,
    entry_count,
    uncertified,
    entry_score,
    entry_first,
    CERTIFICATE: tl.constexpr,
    OUTER_LANES: tl.constexpr,
    OUTER_MEMBERS: tl.constexpr,
    INNER_LANES: tl.constexpr,
    INNER_MEMBERS: tl.constexpr,
    CELL_TILES: tl.constexpr,
    ID_BITS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """List every cell that can hold the nearest code, given the smallest score of this program.

    Each turn of the loop removes the smallest entry of every query and lists it, until no query has an entry within its
    limit; one turn is enough for most queries.
    """
    low_bits: tl.constexpr = (1 << ID_BITS) - 1
    LANES: tl.constexpr = OUTER_LANES * INNER_LANES
    step_codes: tl.constexpr = OUTER_LANES * OUTER_MEMBERS * INNER_LANES * INNER_MEMBERS * CELL_TILES
    lane = tl.arange(0, LANES)[None, :]
    nearest = tl.min(best, axis=1)
    smallest = (nearest | low_bits).to(tl.float32, bitcast=True)
    offset, bound, published = certify(smallest, norm, error, shift, scale, CERTIFICATE)
    bound = tl.where(in_range, bound, -1.0)
    limit_bits = limit.to(tl.pointer_type(tl.int32), bitcast=True)
    useful = in_range & (published < float("inf"))
    tl.atomic_min(limit_bits + query, published.to(tl.int32, bitcast=True), mask=useful, sem="relaxed")
    missed = _entry_distance(tl.min(third, axis=1), offset, ID_BITS) <= bound
    tl.store(uncertified + query, missed.to(tl.int32), mask=missed)
    distance = _entry_distance(nearest, offset, ID_BITS)
    used = distance <= bound
    while tl.max(used.to(tl.int32), axis=0) > 0:
        place = tl.min(tl.where(best == nearest[:, None], lane, LANES), axis=1)
        slot = tl.atomic_add(entry_count + query, tl.full(query.shape, 1, tl.int32), mask=used, sem="relaxed")
        stored = used & (slot < SLOTS)
        outer_column = place // INNER_LANES * (OUTER_MEMBERS * INNER_LANES * INNER_MEMBERS)
        first = start + (outer_column + place % INNER_LANES * INNER_MEMBERS) + (nearest & low_bits) * step_codes
        tl.store(entry_score + query * SLOTS + slot, distance, mask=stored)
        tl.store(entry_first + query * SLOTS + slot, first.to(tl.int32), mask=stored)
        taken = lane == place[:, None]
        best = tl.where(taken, second, best)
        second = tl.where(taken, NO_SCORE, second)
        nearest = tl.min(best, axis=1)
        distance = _entry_distance(nearest, offset, ID_BITS)
        used = distance <= bound


@triton.jit
def distance_key(distance, index):
    """The contract's key: a NaN before every number, then the distance, then the index."""
    bits = tl.where(distance != distance, -1, distance.to(tl.int32, bitcast=True))
    return (bits.to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def cell_distance(row, x_stride_d, code, codebook_stride_d, used, valid, D: tl.constexpr):
    """The exact distance between each row [Q] and its own codes [Q, M]."""
    distance = tl.zeros(code.shape, tl.float32)
    for j in range(D):
        x_value = tl.load(row + j * x_stride_d, mask=used, other=0.0).to(tl.float32)
        code_value = tl.load(code + j * codebook_stride_d, mask=valid, other=0.0).to(tl.float32)
        difference = x_value[:, None] - code_value
        distance += difference * difference  # the first sum adds a square to 0, which is exact
    return distance


@triton.jit
def rounded_to(value, dtype: tl.constexpr):
    """A float32 tensor in ``dtype``, rounded to nearest even; Triton's interpreter would truncate to bfloat16."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(dtype)


@triton.jit(do_not_specialize=["rows", "num_groups", "num_codes", "inner"])
def rerank(
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
    entry_score,
    entry_first,
    # results, contiguous: int64 [N, G], x's dtype [N, G, D], int64 [G, K]
    indices,
    quantized,
    count,
    # sizes
    rows,
    num_groups,
    num_codes,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    # how a listed cell maps to codes
    BLOCK_CODES: tl.constexpr,
    CELL_TILES: tl.constexpr,
    OUTER_MEMBERS: tl.constexpr,
    INNER_LANES: tl.constexpr,
    INNER_MEMBERS: tl.constexpr,
    SLOTS: tl.constexpr,
    # what to do
    CANDIDATES: tl.constexpr,
    QUANTIZE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Program p writes the results of BLOCK_QUERIES queries of group p mod G.

    CANDIDATES: False if ``key`` already holds every answer (the direct form).  Otherwise certified queries take the
    nearest of their listed cells, and all others the ``key`` that the fallback wrote.
    """
    g = (tl.program_id(0) % num_groups).to(tl.int64)
    n = tl.program_id(0) // num_groups * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    exists = n < rows
    query = n.to(tl.int64) * num_groups + g
    codes = codebook + g * codebook_stride_g
    best = tl.load(key + query, mask=exists, other=MAX_KEY)
    if CANDIDATES:
        MEMBERS: tl.constexpr = OUTER_MEMBERS * INNER_MEMBERS
        reach = tl.load(limit + query, mask=exists, other=0.0)
        entries = tl.load(entry_count + query, mask=exists, other=0)
        certified = exists & (tl.load(uncertified + query, mask=exists, other=1) == 0)
        certified = certified & (reach < float("inf")) & (entries <= SLOTS)
        entries = tl.where(certified, entries, 0)
        row = query_rows(x, n, g, inner, x_stride_outer, x_stride_inner, x_stride_g)
        member = tl.arange(0, CELL_TILES * MEMBERS)
        outer_offset = member // MEMBERS * BLOCK_CODES + member // INNER_MEMBERS % OUTER_MEMBERS * (
            INNER_LANES * INNER_MEMBERS
        )
        offset = outer_offset + member % INNER_MEMBERS
        listed = tl.max(entries, axis=0)
        place = tl.arange(0, SLOTS_AT_ONCE)
        for chunk in range(0, listed, SLOTS_AT_ONCE):
            # many splits list many cells, and few of those are within the limit that all splits found together
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
    tl.store(indices + query, index, mask=exists)
    if COUNT:
        one = tl.full([BLOCK_QUERIES], 1, tl.int64)
        tl.atomic_add(count + g * num_codes + index, one, mask=exists, sem="relaxed")
    if QUANTIZE:
        for start in range(0, D, PADDED_D):
            column = start + tl.arange(0, PADDED_D)
            valid = exists[:, None] & (column < D)[None, :]
            code = codes + index[:, None] * codebook_stride_k + column[None, :] * codebook_stride_d
            value = tl.load(code, mask=valid, other=0.0)
            value = rounded_to(value.to(tl.float32), quantized.dtype.element_ty)
            tl.store(quantized + query[:, None] * D + column[None, :], value, mask=valid)
