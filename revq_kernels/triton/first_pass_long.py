"""The first pass on tensor cores for long vectors: a matrix product over packed rows, and a certificate.

`pack` has centered, scaled and rounded queries and codes to float16, with a factor -2 in the queries.  A program keeps
its queries, streams codes past them, and starts each product from the code's norm and T, added in float32:

    S = (|c|^2 + T) - 2 x.c

Everything after that is as for short vectors (tensor_core.py, lanes.py).  A code that stands for padding has a large
norm, one with a NaN a norm that makes its scores negative.
"""

import triton
import triton.language as tl

from revq_kernels.triton import certificate
from revq_kernels.triton.lanes import NO_SCORE, emit_candidates, lane_minimum, update_lanes

_PAD = tl.constexpr(certificate.SCORE_PAD)


@triton.jit(do_not_specialize=["rows", "num_groups", "first_group", "first_code"])
def long_vectors(
    query_high, query_low, query_norm, query_error, code_high, code_low, code_norm,
    scale, limit, found, unsettled, entry_score, entry_first,
    rows, packed_rows, num_groups, first_group, first_code, packed_codes, codes_per_split,
    PITCH: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_CODES: tl.constexpr, CELL_TILES: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    E: tl.constexpr, ID_BITS: tl.constexpr, SLOTS: tl.constexpr, CERTIFICATE: tl.constexpr, STAGES: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Program (b, s): the b-th BLOCK_QUERIES rows, all groups one after another; the s-th codes_per_split codes.

    query_high, query_low: float16 [groups, packed_rows, PITCH], code_high, code_low: [groups, packed_codes, PITCH];
    packed_rows is a multiple of BLOCK_QUERIES, packed_codes of BLOCK_CODES.  CHUNKS: powers of two >= 16 that add up
    to PITCH.  codes_per_split: a multiple of BLOCK_CODES * CELL_TILES, at most 2^ID_BITS times it.  STAGES: 2 to have
    the next tile on its way while one is multiplied, which takes shared memory for both.
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
    for i in tl.static_range(len(CHUNKS)):
        inside = member[:, None] * PITCH + tl.arange(0, CHUNKS[i])[None, :]
        queries = queries + (tl.load(high + inside),)  # noqa: RUF005 (what Triton understands)
        if PARTS == 3:
            queries_low = queries_low + (tl.load(low + inside),)  # noqa: RUF005
        high += CHUNKS[i]
        low += CHUNKS[i]
    norm = tl.load(query_norm + packed + member)
    shift = tl.maximum(tl.max(norm, axis=0), 0.0) * (1 + _PAD) + _PAD

    start = tl.program_id(1) * codes_per_split
    tiles = tl.cdiv(tl.minimum(packed_codes - start, codes_per_split), BLOCK_CODES)
    column = tl.arange(0, BLOCK_CODES)
    code = packed_group * packed_codes + start
    norms = code_norm + code
    high = code_high + code * PITCH
    low = code_low + code * PITCH
    best = tl.full([BLOCK_QUERIES, A * C], NO_SCORE, tl.int32)
    second = best
    third = best
    cell = best
    ahead = tl.load(norms + column)
    for tile in tl.range(tiles, num_stages=STAGES):
        score = tl.broadcast_to((ahead + shift)[None, :], [BLOCK_QUERIES, BLOCK_CODES])
        # the next norms are on their way while the tile is multiplied; after the last, the last again
        ahead = tl.load(norms + tl.minimum(tile + 1, tiles - 1) * BLOCK_CODES + column)
        numbers = high
        numbers_low = low
        for i in tl.static_range(len(CHUNKS)):
            place = column[:, None] * PITCH + tl.arange(0, CHUNKS[i])[None, :]
            operand = tl.trans(tl.load(numbers + place))
            score = tl.dot(queries[i], operand, score)
            if PARTS == 3:
                score = tl.dot(queries_low[i], operand, score)
                score = tl.dot(queries[i], tl.trans(tl.load(numbers_low + place)), score)
            numbers += CHUNKS[i]
            numbers_low += CHUNKS[i]
        cell = lane_minimum(cell, score.to(tl.int32, bitcast=True), A, B, C, E, INLINE_ASM)
        if ((tile + 1) % CELL_TILES == 0) | (tile + 1 == tiles):
            best, second, third = update_lanes(best, second, third, cell, tile // CELL_TILES, ID_BITS)
            cell = tl.maximum(cell, NO_SCORE)  # a constant would be selected for every tile
        high += BLOCK_CODES * PITCH
        low += BLOCK_CODES * PITCH

    group = packed_group + first_group
    n = first_row + member
    query = n.to(tl.int64) * num_groups + group
    has_nan = (tl.min(best, axis=1) < 0).to(tl.int32)
    tl.store(unsettled + query, has_nan, mask=(n < rows) & (has_nan > 0))
    norm = tl.load(query_norm + packed + member)
    error = tl.load(query_error + packed + member)
    emit_candidates(
        best, second, third, norm, error, shift, tl.load(scale + group), norm >= 0, query,
        start.to(tl.int64) + first_code, limit, found, unsettled, entry_score, entry_first, CERTIFICATE,
        A, B, C, E, CELL_TILES, ID_BITS, SLOTS,
    )  # fmt: skip
