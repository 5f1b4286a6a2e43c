"""How a search over long vectors is cut up so that its packed rows fit the workspace: plain arithmetic.

A round packs the queries of some groups, and in turn as many of their codes as fit; the state of the queries goes on
from one to the next, so that nothing else knows of it.
"""

from typing import NamedTuple

CODE_BYTES = 24 * 2**20
"""Of the workspace, for packed codes."""

QUERY_BYTES = 40 * 2**20
"""For packed queries, and all that is known of each query."""


def pitch(d: int) -> int:
    """Numbers of a packed row: a tensor core takes 16 at a time."""
    return -(-d // 16) * 16


def chunks(d: int, depth: int) -> tuple[int, ...]:
    """Powers of two, at most ``depth``, that add up to the pitch: each is one product."""
    left, widths = pitch(d), []
    while left:
        widths.append(min(depth, 1 << (left.bit_length() - 1)))
        left -= widths[-1]
    return tuple(widths)


class LongPlan(NamedTuple):
    """The rounds and the splits of one search."""

    groups_per_round: int
    codes_per_round: int
    """Of each group; a multiple of the codes of a step, or all, in whole tiles."""
    splits: int
    codes_per_split: int
    slots: int
    rows_per_round: int


def plan_long(
    rows: int, num_groups: int, num_codes: int, d: int, parts: int, block_queries: int, block_codes: int,
    cell_tiles: int, multiprocessors: int, max_steps: int = 256, code_bytes: int = CODE_BYTES,
    query_bytes: int = QUERY_BYTES,
) -> LongPlan:  # fmt: skip
    """The plan for ``rows`` queries of each group."""
    vector = 2 * pitch(d) * (2 if parts == 3 else 1)
    step = block_codes * cell_tiles
    codes = _up(num_codes, block_codes)
    if codes * (vector + 8) > code_bytes:
        codes = min(codes, max(step, code_bytes // (vector + 8) // step * step))
    groups = min(num_groups, max(1, code_bytes // (codes * (vector + 8))))
    code_rounds = -(-num_codes // codes)
    packed, known = groups * (vector + 8), num_groups * 20
    rows_now = _up(min(rows, max(block_queries, query_bytes // (packed + known + 128 * num_groups))), block_queries)
    wanted = -(-2 * multiprocessors // (groups * (rows_now // block_queries)))
    steps = min(max_steps, max(1, -(-codes // (step * wanted))))
    splits = -(-codes // (steps * step))
    slots = _up(2 * splits * code_rounds + 6, 8)
    most = query_bytes // (packed + known + 8 * slots * num_groups)
    return LongPlan(groups, codes, splits, steps * step, slots, max(block_queries, most // 256 * 256))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
