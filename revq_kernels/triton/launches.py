"""The search on a GPU: launches, in the order of one stream, with no word to the host in between.

A first pass lists each query's candidates with a certificate; the fallback gives D over all codes to the queries that it
did not settle; `settle` gives D to the candidates.  The direct form is D over all codes for every query.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from revq_kernels.triton.addressing import GroupedRows, grouped_rows, padded
from revq_kernels.triton.candidates import settle
from revq_kernels.triton.certificate import constants
from revq_kernels.triton.direct import direct_search, fallback
from revq_kernels.triton.first_pass_fma import fma
from revq_kernels.triton.first_pass_tensor_core import tensor_core
from revq_kernels.triton.launch import Launch
from revq_kernels.triton.long_launch import long_launches
from revq_kernels.triton.plan import Plan
from revq_kernels.triton.prepare import SAMPLES, prepare

STATES_PER_PROGRAM = 1024
STAGES = 2
"""Tiles of packed codes that are in shared memory together."""
CANDIDATES_PER_PROGRAM = 256
"""Codes that one program of `settle` looks at together: two for each of its threads, so that nothing spills."""


class State(NamedTuple):
    """The workspace: what the kernels tell one another about each query, and about each group."""

    limit: Tensor
    found: Tensor
    unsettled: Tensor
    key: Tensor
    entry_score: Tensor
    entry_first: Tensor
    center: Tensor
    scale: Tensor

    def settled(self, plan: Plan) -> Tensor:
        """bool: queries whose certificate held, which the fallback did not touch (after a first pass)."""
        return (self.unsettled == 0) & (self.limit < torch.inf) & (self.found <= plan.slots)

    @classmethod
    def empty(cls, queries: int, slots: int, num_groups: int, d: int, device: torch.device) -> "State":
        """Uninitialized memory for ``queries`` queries (all groups together)."""

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


class Round(NamedTuple):
    """Queries that go through all launches together."""

    rows: GroupedRows
    codebook: Tensor
    indices: Tensor
    quantized: Tensor | None
    count: Tensor | None
    plan: Plan
    state: State

    @property
    def source(self) -> tuple[Any, ...]:
        """The first arguments of every kernel that reads queries and codes."""
        return *self.rows.arguments(), self.codebook, *self.codebook.stride()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N of this round, G, K."""
        return self.rows.count, *self.codebook.shape[:2]


def search(
    x: Tensor, codebook: Tensor, indices: Tensor, quantized: Tensor | None, count: Tensor | None, plan: Plan
) -> list[State]:
    """Write indices int64 ``[N, G]`` (contiguous), quantized ``[N, G, d]`` and the counts as asked for.

    Returns:
        What the kernels knew of each query at the end, round by round, for those who want to know what was settled.
    """
    rounds = list(rounds_of(x, codebook, indices, quantized, count, plan))
    for each in rounds:
        for launch in launches(each):
            launch.run()
    return [each.state for each in rounds]


def rounds_of(
    x: Tensor, codebook: Tensor, indices: Tensor, quantized: Tensor | None, count: Tensor | None, plan: Plan
) -> Iterator[Round]:
    """The queries in pieces whose workspace is bounded."""
    num_groups, _, d = codebook.shape
    for first, rows in grouped_rows(x).rounds(plan.rows_per_round):
        part = slice(first, first + rows.count)
        state = State.empty(rows.count * num_groups, plan.slots, num_groups, d, x.device)
        values = None if quantized is None else quantized[part]
        yield Round(rows, codebook, indices[part], values, count, plan, state)


def launches(this: Round) -> Iterator[Launch]:
    """Every launch of one round, in order."""
    if this.plan.first_pass is None:
        if this.plan.splits > 1:
            yield _prepare(this)
        yield _direct(this)
    else:
        yield _prepare(this)
        if this.plan.long is not None:
            yield from long_launches(
                this.source, this.state, this.sizes, this.plan.long, this.plan.first_pass, STAGES, this.plan.inline_asm
            )
        else:
            yield _first_pass(this)
        yield _fallback(this)
    yield _settle(this)


def _prepare(this: Round) -> Launch:
    state, d = this.state, this.codebook.shape[2]
    rows, num_groups, num_codes = this.sizes
    arguments = (
        this.codebook, *this.codebook.stride(), state.center, state.scale, state.limit, state.found, state.unsettled,
        state.key, rows * num_groups, num_groups, num_codes,
    )  # fmt: skip
    blocks = {"ROWS": max(1, min(32, 2048 // padded(d))), "SAMPLES": SAMPLES, "STATES": STATES_PER_PROGRAM}
    grid = (max(num_groups, triton.cdiv(rows * num_groups, STATES_PER_PROGRAM)),)
    return Launch(prepare, grid, arguments, {"D": d, "PADDED_D": padded(d), **blocks}, 4, False)


def _direct(this: Round) -> Launch:
    plan, direct = this.plan, this.plan.direct
    rows, num_groups, _ = this.sizes
    blocks = {
        "D": this.codebook.shape[2], "BLOCK_QUERIES": direct.block_queries, "BLOCK_CODES": direct.block_codes,
        "REGISTER_DIMS": direct.register_dims, "DIM_STEP": direct.dim_step, "SPLIT": plan.splits > 1,
        "INLINE_ASM": plan.inline_asm,
    }  # fmt: skip
    grid = (num_groups * triton.cdiv(rows, direct.block_queries), plan.splits)
    arguments = (*this.source, this.state.key, *this.sizes, plan.codes_per_split)
    return Launch(direct_search, grid, arguments, blocks, direct.num_warps, False)


def _fallback(this: Round) -> Launch:
    plan, direct, state = this.plan, this.plan.direct, this.state
    rows, num_groups, num_codes = this.sizes
    blocks = {
        "D": this.codebook.shape[2], "BLOCK_QUERIES": direct.fallback_queries, "BLOCK_CODES": direct.fallback_codes,
        "REGISTER_DIMS": direct.register_dims, "DIM_STEP": direct.dim_step, "SLOTS": plan.slots,
        "FLAG_BLOCK": direct.flag_block, "INLINE_ASM": plan.inline_asm,
    }  # fmt: skip
    grid = (num_groups * triton.cdiv(rows, direct.flag_block), plan.fallback_splits)
    flags = (state.limit, state.found, state.unsettled, state.key)
    arguments = (*this.source, *flags, *this.sizes, triton.cdiv(num_codes, plan.fallback_splits))
    return Launch(fallback, grid, arguments, blocks, direct.fallback_warps, False)


def _first_pass(this: Round) -> Launch:
    plan, state, chosen = this.plan, this.state, this.plan.first_pass
    rows, num_groups, _ = this.sizes
    d = this.codebook.shape[2]
    a, b, c, e = chosen.lanes
    steps = triton.cdiv(plan.codes_per_split, chosen.codes_per_step)
    blocks = {
        "D": d, "BLOCK_QUERIES": chosen.block_queries, "BLOCK_CODES": chosen.block_codes,
        "CELL_TILES": chosen.cell_tiles, "A": a, "B": b, "C": c, "E": e, "ID_BITS": (steps - 1).bit_length(),
        "SLOTS": plan.slots, "CERTIFICATE": tuple(constants(chosen.form, d, chosen.parts)),
        "INLINE_ASM": plan.inline_asm,
    }  # fmt: skip
    arguments = (
        *this.source, state.center, state.scale, state.limit, state.found, state.unsettled, state.entry_score,
        state.entry_first, *this.sizes, plan.codes_per_split,
    )  # fmt: skip
    if chosen.form == "tensor_core":
        kernel = tensor_core
        blocks |= {"DIMS": chosen.depth, "PARTS": chosen.parts, "CONTIGUOUS": this.codebook.is_contiguous()}
    else:
        kernel, direct = fma, plan.direct
        blocks |= {"REGISTER_DIMS": direct.register_dims, "DIM_STEP": direct.dim_step, "UNROLL": chosen.unroll}
    grid = (num_groups * triton.cdiv(rows, chosen.block_queries), plan.splits)
    return Launch(kernel, grid, arguments, blocks, chosen.num_warps, True)


def _settle(this: Round) -> Launch:
    plan, state, chosen = this.plan, this.state, this.plan.first_pass
    rows, num_groups, _ = this.sizes
    d = this.codebook.shape[2]
    cell = {"BLOCK_CODES": 1, "CELL_TILES": 1, "B": 1, "C": 1, "E": 1}
    if chosen is not None:
        _, b, c, e = chosen.lanes
        cell = {"BLOCK_CODES": chosen.block_codes, "CELL_TILES": chosen.cell_tiles, "B": b, "C": c, "E": e}
    members = cell["CELL_TILES"] * cell["B"] * cell["E"]
    queries = max(1, min(16, CANDIDATES_PER_PROGRAM // members)) if chosen else 32
    values, counts = this.quantized, this.count
    blocks = {
        "D": d, "PADDED_D": min(padded(d), 64), "BLOCK_QUERIES": queries, "SLOTS": plan.slots, **cell,
        "CANDIDATES": chosen is not None, "QUANTIZE": values is not None, "COUNT": counts is not None,
    }  # fmt: skip
    arguments = (
        *this.source, state.limit, state.found, state.unsettled, state.key, state.entry_score, state.entry_first,
        this.indices, this.indices if values is None else values, this.indices if counts is None else counts,
        *this.sizes,
    )  # fmt: skip
    return Launch(settle, (num_groups * triton.cdiv(rows, queries),), arguments, blocks, 4, False)
