"""Launches of the first pass over long vectors: queries packed once, codes packed and searched round by round."""

from typing import Any

import torch
import triton

from revq_kernels.triton.addressing import padded
from revq_kernels.triton.certificate import constants
from revq_kernels.triton.long_plan import chunks, pitch
from revq_kernels.triton.long_vectors import long_vectors
from revq_kernels.triton.pack import pack_codes, pack_queries


class Packed:
    """Uninitialised packed rows ``[groups, rows, pitch]`` with their norms, for queries also the error."""

    def __init__(self, groups: int, rows: int, d: int, parts: int, device: torch.device) -> None:
        self.rows = rows
        self.high = torch.empty(groups, rows, pitch(d), dtype=torch.float16, device=device)
        self.low = torch.empty_like(self.high) if parts == 3 else self.high
        self.norm = torch.empty(groups, rows, dtype=torch.float32, device=device)
        self.error = torch.empty_like(self.norm)


def search_long(source: tuple[Any, ...], state: Any, sizes: tuple[int, int, int], plan: Any, chosen: Any,
                depth: int, num_stages: int, inline_asm: bool) -> None:  # fmt: skip
    """The first pass for all queries of ``source`` = (x, inner, 4 strides, codebook, 3 strides).

    state: search.State.  sizes: (rows, num_groups, num_codes).  plan: long_plan.LongPlan.  chosen: FirstPassConfig.
    """
    rows, num_groups, num_codes = sizes
    d, parts, device = state.centre.shape[1], chosen.parts, state.centre.device
    a, b, c, e = chosen.lanes
    shape = {"D": d, "PADDED_D": padded(d), "PITCH": pitch(d), "ROWS": max(1, min(16, 4096 // padded(d)))}
    blocks = triton.cdiv(rows, chosen.block_queries)
    queries = Packed(plan.groups_per_round, blocks * chosen.block_queries, d, parts, device)
    codes = Packed(plan.groups_per_round, plan.codes_per_round, d, parts, device)
    steps = triton.cdiv(plan.codes_per_split, chosen.codes_per_step)
    for first_group in range(0, num_groups, plan.groups_per_round):
        groups = min(plan.groups_per_round, num_groups - first_group)
        pack_queries[(queries.rows // shape["ROWS"], groups)](
            *source[:6], state.centre, state.scale, queries.high, queries.low, queries.norm, queries.error,
            state.unsettled, first_group, rows, num_groups, queries.rows, **shape, PARTS=parts, num_warps=4,
        )  # fmt: skip
        for first_code in range(0, num_codes, plan.codes_per_round):
            left = min(plan.codes_per_round, num_codes - first_code)
            tiles = triton.cdiv(left, chosen.block_codes) * chosen.block_codes
            pack_codes[(tiles // shape["ROWS"], groups)](
                *source[6:], state.centre, state.scale, codes.high, codes.low, codes.norm,
                first_group, first_code, num_codes, tiles, **shape, PARTS=parts, num_warps=4,
            )  # fmt: skip
            long_vectors[(groups * blocks, triton.cdiv(left, plan.codes_per_split))](
                queries.high, queries.low, queries.norm, queries.error, codes.high, codes.low, codes.norm,
                state.scale, state.limit, state.found, state.unsettled, state.entry_score, state.entry_first,
                rows, queries.rows, num_groups, first_group, first_code, tiles, plan.codes_per_split,
                PITCH=pitch(d), CHUNKS=chunks(d, depth), PARTS=parts, BLOCK_QUERIES=chosen.block_queries,
                BLOCK_CODES=chosen.block_codes, CELL_TILES=chosen.cell_tiles, A=a, B=b, C=c, E=e,
                ID_BITS=(steps - 1).bit_length(), SLOTS=plan.slots,
                CERTIFICATE=tuple(constants("tensor_core", d, parts)), INLINE_ASM=inline_asm,
                num_warps=chosen.num_warps, num_stages=num_stages,
            )  # fmt: skip
