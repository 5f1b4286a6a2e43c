"""Launches of the first pass over long vectors: queries packed once, codes packed and searched round by round."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revq_kernels.triton.addressing import padded
from revq_kernels.triton.blocks import FirstPassConfig
from revq_kernels.triton.certificate import constants
from revq_kernels.triton.first_pass_long import long_vectors
from revq_kernels.triton.launch import Launch
from revq_kernels.triton.long_plan import LongPlan, chunks, pitch
from revq_kernels.triton.pack import pack_codes, pack_queries

PACK_WARPS = 4


class Packed(NamedTuple):
    """Packed vectors in the workspace: float16 ``[groups, rows, pitch]``, and float32 ``[groups, rows]``."""

    high: Tensor
    low: Tensor
    """Is ``high`` where vectors have one part."""
    norm: Tensor
    error: Tensor
    """Of queries alone."""

    @classmethod
    def empty(cls, groups: int, rows: int, d: int, parts: int, device: torch.device) -> "Packed":
        """Uninitialized memory for ``rows`` vectors of each group."""
        high = torch.empty(groups, rows, pitch(d), dtype=torch.float16, device=device)
        norm = torch.empty(groups, rows, dtype=torch.float32, device=device)
        return cls(high, torch.empty_like(high) if parts == 3 else high, norm, torch.empty_like(norm))


def long_launches(
    source: tuple[Any, ...], state: Any, sizes: tuple[int, int, int], plan: LongPlan, chosen: FirstPassConfig,
    stages: int, inline_asm: bool,
) -> Iterator[Launch]:  # fmt: skip
    """Every launch of the first pass, in order; between ``prepare`` and ``fallback``.

    source: queries, inner size and four strides, codebook and three strides.  state: a search.State whose tensors have
    ``plan.slots``.  sizes: rows of this round, groups, codes.
    """
    rows, num_groups, num_codes = sizes
    d, parts = state.center.shape[1], chosen.parts
    blocks = -(-rows // chosen.block_queries)
    pack = {"D": d, "PADDED_D": padded(d), "PITCH": pitch(d), "ROWS": min(16, 4096 // padded(d)), "PARTS": parts}
    a, b, c, e = chosen.lanes
    steps = -(-plan.codes_per_split // chosen.codes_per_step)
    search = {
        "PITCH": pitch(d), "CHUNKS": chunks(d, chosen.depth), "PARTS": parts, "BLOCK_QUERIES": chosen.block_queries,
        "BLOCK_CODES": chosen.block_codes, "CELL_TILES": chosen.cell_tiles, "A": a, "B": b, "C": c, "E": e,
        "ID_BITS": (steps - 1).bit_length(), "SLOTS": plan.slots, "STAGES": stages, "INLINE_ASM": inline_asm,
        "CERTIFICATE": tuple(constants("tensor_core", d, parts)),
    }  # fmt: skip
    packed_rows = blocks * chosen.block_queries
    queries = Packed.empty(plan.groups_per_round, packed_rows, d, parts, state.center.device)
    codes = Packed.empty(plan.groups_per_round, plan.codes_per_round, d, parts, state.center.device)
    space = (state.center, state.scale)
    known = (state.limit, state.found, state.unsettled, state.entry_score, state.entry_first)
    for first_group in range(0, num_groups, plan.groups_per_round):
        groups = min(plan.groups_per_round, num_groups - first_group)
        where = (first_group, rows, num_groups, packed_rows)
        arguments = (*source[:6], *space, *queries, state.unsettled, *where)
        yield Launch(pack_queries, (packed_rows // pack["ROWS"], groups), arguments, pack, PACK_WARPS, True)
        for first_code in range(0, num_codes, plan.codes_per_round):
            left = min(plan.codes_per_round, num_codes - first_code)
            packed_codes = -(-left // chosen.block_codes) * chosen.block_codes
            where = (first_group, first_code, num_codes, packed_codes)
            arguments = (*source[6:], *space, *codes[:3], *where)
            yield Launch(pack_codes, (packed_codes // pack["ROWS"], groups), arguments, pack, PACK_WARPS, True)
            where = (rows, packed_rows, num_groups, first_group, first_code, packed_codes, plan.codes_per_split)
            arguments = (*queries, *codes[:3], state.scale, *known, *where)
            grid = (groups * blocks, -(-left // plan.codes_per_split))
            yield Launch(long_vectors, grid, arguments, search, chosen.num_warps, True)
