"""What both first passes keep of the scores they see, and how they hand it on.

A tile's columns are numbered ((a*B + b)*C + c)*E + e; a *lane* is (a, c), written a*C + c.  A *cell* is a lane over
CELL_TILES consecutive tiles, which is one *step* of the program.  Scores are positive float32, whose bits order as the
floats do, so all comparisons are of int32.  For every query and lane a program keeps its three smallest cells, each as
the cell's smallest score with the low ID_BITS replaced by the number of the step: the index of a code costs nothing
until the end, and `settle` finds it by computing D for the few codes of each reported cell.

Three rather than one, because equal codes are normal: a twin of the nearest code lies in another lane, or in another
cell of the same lane, and is reported like the first.  Only a query whose third cell of one lane could win as well may
miss a candidate, and is left to the fallback.
"""

import triton
import triton.language as tl

from revq_kernels.triton.certificate import certify, distance_below

NO_SCORE = tl.constexpr(0x7EFFFFFF)
"""The bits of a finite float above every score."""


@triton.jit
def minimum_of_three(a, b, c, INLINE_ASM: tl.constexpr):
    """The smallest of three int32; ptxas makes one instruction of the inline form where the card has it."""
    if INLINE_ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 t; min.s32 t, $1, $2; min.s32 $0, t, $3; }", "=r,r,r,r", [a, b, c],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.minimum(tl.minimum(a, b), c)


@triton.jit
def lane_minimum(
    cell, bits, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, E: tl.constexpr, INLINE_ASM: tl.constexpr
):
    """cell [Q, A*C] and a tile's bits [Q, A*B*C*E], int32: the smallest of each lane's cell and columns."""
    members = tl.permute(tl.reshape(bits, [bits.shape[0], A, B, C, E]), [0, 1, 3, 2, 4])
    parts = (tl.reshape(members, [bits.shape[0], A * C, B * E]),)
    LEVELS: tl.constexpr = (B * E >= 2) + (B * E >= 4) + (B * E >= 8) + (B * E >= 16) + (B * E >= 32)
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(2**level):
            even, odd = tl.split(tl.reshape(parts[i], [bits.shape[0], A * C, B * E // 2 ** (level + 1), 2]))
            halves = halves + (even, odd)  # noqa: RUF005 (what Triton understands)
        parts = halves
    if B * E == 1:
        cell = tl.minimum(cell, tl.reshape(parts[0], cell.shape))
    for i in tl.static_range(B * E // 2):
        left, right = tl.reshape(parts[2 * i], cell.shape), tl.reshape(parts[2 * i + 1], cell.shape)
        cell = minimum_of_three(cell, left, right, INLINE_ASM)
    return cell


@triton.jit
def update_lanes(best, second, third, cell, step, ID_BITS: tl.constexpr):
    """Enter the cell minima (int32 bits) of one step; returns the three smallest of each lane."""
    entry = (cell & (-1 << ID_BITS)) | step
    third = tl.minimum(third, tl.maximum(second, entry))
    second = tl.minimum(second, tl.maximum(best, entry))
    return tl.minimum(best, entry), second, third


@triton.jit
def _distance(entry, offset, ID_BITS: tl.constexpr):
    """The squared distance that an entry stands for, rounded towards zero."""
    return distance_below((entry & (-1 << ID_BITS)).to(tl.float32, bitcast=True), offset)


@triton.jit
def emit_candidates(
    best, second, third, norm, error, shift, scale, trusted, query, start, limit, found, unsettled,
    entry_score, entry_first, CERTIFICATE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    E: tl.constexpr, CELL_TILES: tl.constexpr, ID_BITS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Report every cell that may hold the nearest code, by the smallest score of this program.

    best, second, third: int32 [Q, A*C].  norm, error: float32 [Q], |x_h|^2 and |x' - x_h|^2 of each query as it was
    multiplied.  shift: T of the scores.  trusted: bool [Q], queries that exist and are in range.  query: int64 [Q],
    their flattened numbers.  start: the program's first code.

    The nearest cell of each query is taken out and listed until no query has one within its limit: one turn for most.
    """
    low_bits: tl.constexpr = (1 << ID_BITS) - 1
    step_codes: tl.constexpr = A * B * C * E * CELL_TILES
    lane = tl.arange(0, A * C)[None, :]
    nearest = tl.min(best, axis=1)
    smallest = (nearest | low_bits).to(tl.float32, bitcast=True)
    offset, bound, published = certify(smallest, norm, error, shift, scale, CERTIFICATE)
    bound = tl.where(trusted, bound, -1.0)
    limit_bits = limit.to(tl.pointer_type(tl.int32), bitcast=True)
    useful = trusted & (published < float("inf"))
    tl.atomic_min(limit_bits + query, published.to(tl.int32, bitcast=True), mask=useful, sem="relaxed")
    missed = _distance(tl.min(third, axis=1), offset, ID_BITS) <= bound
    tl.store(unsettled + query, missed.to(tl.int32), mask=missed)
    distance = _distance(nearest, offset, ID_BITS)
    used = distance <= bound
    while tl.max(used.to(tl.int32), axis=0) > 0:
        place = tl.min(tl.where(best == nearest[:, None], lane, A * C), axis=1)
        slot = tl.atomic_add(found + query, tl.full(query.shape, 1, tl.int32), mask=used, sem="relaxed")
        stored = used & (slot < SLOTS)
        first = start + (place // C * (B * C * E) + place % C * E) + (nearest & low_bits) * step_codes
        tl.store(entry_score + query * SLOTS + slot, distance, mask=stored)
        tl.store(entry_first + query * SLOTS + slot, first.to(tl.int32), mask=stored)
        taken = lane == place[:, None]
        best = tl.where(taken, second, best)
        second = tl.where(taken, NO_SCORE, second)
        nearest = tl.min(best, axis=1)
        distance = _distance(nearest, offset, ID_BITS)
        used = distance <= bound
