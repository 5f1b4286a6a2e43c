"""The search on a GPU: launches, in the order of one stream, with no word to the host in between.

A first pass lists each query's candidates with a certificate; the fallback gives D over all codes to the queries that it
did not settle; `settle` gives D to the candidates.  The direct form is D over all codes for every query.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from revq_kernels.triton.addressing import GroupedRows, grouped_rows, padded
from revq_kernels.triton.config import Plan
from revq_kernels.triton.direct import direct_search, fallback
from revq_kernels.triton.prepare import SAMPLES, prepare
from revq_kernels.triton.settle import settle

STATES_PER_PROGRAM = 1024
SETTLE_QUERIES = 32


class State(NamedTuple):
    """The workspace: what the kernels tell one another about each query, and about each group."""

    limit: Tensor
    found: Tensor
    unsettled: Tensor
    key: Tensor
    entry_score: Tensor
    entry_first: Tensor
    centre: Tensor
    scale: Tensor

    def settled(self, plan: Plan) -> Tensor:
        """bool: queries whose certificate held, which the fallback did not touch (after a first pass)."""
        return (self.unsettled == 0) & (self.limit < torch.inf) & (self.found <= plan.slots)

    @classmethod
    def empty(cls, queries: int, slots: int, num_groups: int, d: int, device: torch.device) -> "State":
        """Uninitialised memory for ``queries`` queries (all groups together)."""

        def words(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            words(torch.float32, queries),
            words(torch.int32, queries),
            words(torch.int32, queries),
            words(torch.int64, queries),
            words(torch.float32, queries, slots),
            words(torch.int32, queries, slots),
            words(torch.float32, num_groups, d),
            words(torch.float32, num_groups),
        )


def search(
    x: Tensor, codebook: Tensor, indices: Tensor, quantized: Tensor | None, count: Tensor | None, plan: Plan
) -> list[State]:
    """Write indices int64 ``[N, G]`` (contiguous), quantized ``[N, G, d]`` and the counts as asked for.

    Returns:
        What the kernels knew of each query at the end, round by round, for those who want to know what was settled.
    """
    states = []
    for first, rows in grouped_rows(x).rounds(plan.rows_per_round):
        part = slice(first, first + rows.count)
        values = None if quantized is None else quantized[part]
        states.append(_round(rows, codebook, indices[part], values, count, plan))
    return states


def _round(
    rows: GroupedRows, codebook: Tensor, indices: Tensor, quantized: Tensor | None, count: Tensor | None, plan: Plan
) -> State:
    num_groups, num_codes, d = codebook.shape
    queries = rows.count * num_groups
    direct, first_pass = plan.direct, plan.first_pass
    state = State.empty(queries, plan.slots, num_groups, d, indices.device)
    source = (*rows.arguments(), codebook, *codebook.stride())
    sizes = (rows.count, num_groups, num_codes)
    if first_pass is not None or plan.splits > 1:
        _prepare(state, codebook, queries)
    if first_pass is None:
        _direct(source, state, sizes, plan)
    else:
        _first_pass(source, state, sizes, plan)
        grid = (num_groups * triton.cdiv(rows.count, direct.flag_block), plan.fallback_splits)
        fallback[grid](
            *source, state.limit, state.found, state.unsettled, state.key, *sizes,
            triton.cdiv(num_codes, plan.fallback_splits),
            D=d, BLOCK_QUERIES=direct.fallback_queries, BLOCK_CODES=direct.fallback_codes,
            REGISTER_DIMS=direct.register_dims, DIM_STEP=direct.dim_step, SLOTS=plan.slots,
            FLAG_BLOCK=direct.flag_block, num_warps=direct.fallback_warps, enable_fp_fusion=False,
        )  # fmt: skip
    cells: dict[str, Any] = {"BLOCK_CODES": 1, "CELL_TILES": 1, "B": 1, "C": 1, "E": 1}
    if first_pass is not None:
        _, b, c, e = first_pass.lanes
        cells = {"BLOCK_CODES": first_pass.block_codes, "CELL_TILES": first_pass.cell_tiles, "B": b, "C": c, "E": e}
    settle[(num_groups * triton.cdiv(rows.count, SETTLE_QUERIES),)](
        *source, state.limit, state.found, state.unsettled, state.key, state.entry_score, state.entry_first,
        indices, indices if quantized is None else quantized, indices if count is None else count, *sizes,
        D=d, PADDED_D=min(padded(d), 64), BLOCK_QUERIES=SETTLE_QUERIES, SLOTS=plan.slots, **cells,
        CANDIDATES=first_pass is not None, QUANTIZE=quantized is not None, COUNT=count is not None,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return state


def _prepare(state: State, codebook: Tensor, queries: int) -> None:
    num_groups, num_codes, d = codebook.shape
    prepare[(max(num_groups, triton.cdiv(queries, STATES_PER_PROGRAM)),)](
        codebook, *codebook.stride(), state.centre, state.scale, state.limit, state.found, state.unsettled, state.key,
        queries, num_groups, num_codes,
        D=d, PADDED_D=padded(d), ROWS=max(1, min(32, 2048 // padded(d))), SAMPLES=SAMPLES, STATES=STATES_PER_PROGRAM,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _direct(source: tuple[Any, ...], state: State, sizes: tuple[int, int, int], plan: Plan) -> None:
    rows, num_groups, _ = sizes
    direct, d = plan.direct, state.centre.shape[1]
    direct_search[(num_groups * triton.cdiv(rows, direct.block_queries), plan.splits)](
        *source, state.key, *sizes, plan.codes_per_split,
        D=d, BLOCK_QUERIES=direct.block_queries, BLOCK_CODES=direct.block_codes,
        REGISTER_DIMS=direct.register_dims, DIM_STEP=direct.dim_step, SPLIT=plan.splits > 1,
        num_warps=direct.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
