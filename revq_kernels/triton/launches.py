"""Launch a search on a GPU: a sequence of kernels on one stream that never waits for the host.

`prepare` initializes the workspace, a first pass lists each query's candidates with a certificate, `fallback` computes
the exact distance to all codes for the queries without one, and `rerank` to the candidates of the others.  The direct
form computes the exact distance to all codes for every query.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from revq_kernels.triton.addressing import GroupedRows, grouped_rows
from revq_kernels.triton.candidates import rerank
from revq_kernels.triton.certificate import constants
from revq_kernels.triton.direct import SAMPLES, direct_search, fallback, prepare
from revq_kernels.triton.first_pass_fma import first_pass_fma
from revq_kernels.triton.first_pass_long import first_pass_long, pack_codes, pack_queries
from revq_kernels.triton.first_pass_tensor_core import first_pass_tensor_core
from revq_kernels.triton.plan import FirstPassConfig, LaneLayout, LongPlan, Plan, pitch, product_depths

STATES_PER_PROGRAM = 1024
STAGES = 2
"""Tiles of packed codes that shared memory holds at a time."""
CANDIDATES_PER_PROGRAM = 256
"""Codes that one program of `rerank` compares at a time: two per thread, so that nothing spills."""
PACK_WARPS = 4


class Launch(NamedTuple):
    """``kernel[grid](*arguments, **constants)`` as data, which can be inspected, or compiled for another card."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    fp_fusion: bool
    """Whether the compiler may fuse multiply and add; never for kernels that compute the exact distance."""

    def run(self) -> None:
        """Launch the kernel on the current stream of its tensors' device."""
        first = next(argument for argument in self.arguments if isinstance(argument, Tensor))
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": self.fp_fusion}
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                self.kernel[self.grid](*self.arguments, **self.constants, **options)
        else:
            self.kernel[self.grid](*self.arguments, **self.constants, **options)


class Workspace(NamedTuple):
    """The state of each query and group, which the kernels of one search share."""

    limit: Tensor
    """float32 [queries]: codes whose stored score is above it are not the nearest; inf if nothing is proven."""
    entry_count: Tensor
    """int32 [queries]: entries that were listed, or that found no slot."""
    uncertified: Tensor
    """int32 [queries]: not 0 if the first pass may have missed a candidate."""
    key: Tensor
    """int64 [queries]: smallest key of the direct form or of the fallback."""
    entry_score: Tensor
    """float32 [queries, slots]"""
    entry_first: Tensor
    """int32 [queries, slots]: the first code of each listed cell."""
    center: Tensor
    """float32 [G, d]"""
    scale: Tensor
    """float32 [G]"""

    @classmethod
    def empty(cls, queries: int, slots: int, num_groups: int, d: int, device: torch.device) -> "Workspace":
        """Uninitialized memory for ``queries`` queries (all groups together)."""
        return cls(
            limit=torch.empty(queries, dtype=torch.float32, device=device),
            entry_count=torch.empty(queries, dtype=torch.int32, device=device),
            uncertified=torch.empty(queries, dtype=torch.int32, device=device),
            key=torch.empty(queries, dtype=torch.int64, device=device),
            entry_score=torch.empty(queries, slots, dtype=torch.float32, device=device),
            entry_first=torch.empty(queries, slots, dtype=torch.int32, device=device),
            center=torch.empty(num_groups, d, dtype=torch.float32, device=device),
            scale=torch.empty(num_groups, dtype=torch.float32, device=device),
        )

    @property
    def flags(self) -> tuple[Tensor, Tensor, Tensor]:
        """What decides whether a query is certified."""
        return self.limit, self.entry_count, self.uncertified

    @property
    def entries(self) -> tuple[Tensor, Tensor]:
        """The listed cells of every query."""
        return self.entry_score, self.entry_first

    @property
    def groups(self) -> tuple[Tensor, Tensor]:
        """How vectors are centered and scaled."""
        return self.center, self.scale

    def certified(self, slots: int) -> Tensor:
        """bool [queries]: the certificate holds, so that the fallback skipped the query (after a first pass)."""
        return (self.uncertified == 0) & (self.limit < torch.inf) & (self.entry_count <= slots)


class Packed(NamedTuple):
    """Packed vectors in the workspace of a search over long vectors."""

    high: Tensor
    """float16 [groups, rows, pitch]"""
    low: Tensor
    """The same; with one product it is ``high``, and not used."""
    norm: Tensor
    """float32 [groups, rows]"""
    error: Tensor
    """float32 [groups, rows], for queries only."""

    @classmethod
    def empty(cls, groups: int, rows: int, d: int, products: int, device: torch.device) -> "Packed":
        """Uninitialized memory for ``rows`` vectors of each group."""
        high = torch.empty(groups, rows, pitch(d), dtype=torch.float16, device=device)
        norm = torch.empty(groups, rows, dtype=torch.float32, device=device)
        return cls(high, torch.empty_like(high) if products == 3 else high, norm, torch.empty_like(norm))

    @property
    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Kernel arguments of packed codes."""
        return self.high, self.low, self.norm


@dataclass(frozen=True)
class QueryChunk:
    """Queries that pass through all launches together, and where their results go."""

    rows: GroupedRows
    codebook: Tensor
    indices: Tensor
    quantized: Tensor | None
    count: Tensor | None
    workspace: Workspace

    @property
    def query_arguments(self) -> tuple[Any, ...]:
        """Queries as kernels take them: tensor, inner size, four strides."""
        return self.rows.arguments()

    @property
    def code_arguments(self) -> tuple[Any, ...]:
        """Codes as kernels take them: tensor, three strides."""
        return self.codebook, *self.codebook.stride()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(N of this chunk, G, K)."""
        return self.rows.count, *self.codebook.shape[:2]

    @property
    def d(self) -> int:
        """The code dimension."""
        return self.codebook.shape[2]


def search(
    x: Tensor, codebook: Tensor, indices: Tensor, quantized: Tensor | None, count: Tensor | None, plan: Plan
) -> list[Workspace]:
    """Write indices int64 ``[N, G]`` (contiguous), and if given quantized ``[N, G, d]`` and count int64 ``[G, K]``.

    Returns:
        The workspace of every chunk of queries, from which tests and benchmarks read what was certified.
    """
    chunks = list(query_chunks(x, codebook, indices, quantized, count, plan))
    for chunk in chunks:
        for launch in launches(chunk, plan):
            launch.run()
    return [chunk.workspace for chunk in chunks]


def query_chunks(
    x: Tensor, codebook: Tensor, indices: Tensor, quantized: Tensor | None, count: Tensor | None, plan: Plan
) -> Iterator[QueryChunk]:
    """The queries in chunks whose workspace is bounded."""
    num_groups, _, d = codebook.shape
    for first, rows in grouped_rows(x).chunks(plan.rows_per_chunk):
        part = slice(first, first + rows.count)
        workspace = Workspace.empty(rows.count * num_groups, plan.slots, num_groups, d, x.device)
        values = None if quantized is None else quantized[part]
        yield QueryChunk(rows, codebook, indices[part], values, count, workspace)


def launches(chunk: QueryChunk, plan: Plan) -> Iterator[Launch]:
    """Every launch for one chunk of queries, in order."""
    if plan.first_pass is None:
        if plan.splits > 1:
            yield prepare_launch(chunk)
        yield direct_launch(chunk, plan)
    else:
        yield prepare_launch(chunk)
        if plan.long is not None:
            yield from long_launches(chunk, plan.long, plan.first_pass, inline_asm=plan.inline_asm)
        else:
            yield first_pass_launch(chunk, plan, plan.first_pass)
        yield fallback_launch(chunk, plan)
    yield rerank_launch(chunk, plan)


def prepare_launch(chunk: QueryChunk) -> Launch:
    """Initialize the workspace."""
    workspace, d = chunk.workspace, chunk.d
    rows, num_groups, num_codes = chunk.sizes
    num_states = rows * num_groups
    padded_d = triton.next_power_of_2(d)
    arguments = (
        *chunk.code_arguments,
        *workspace.groups,
        *workspace.flags,
        workspace.key,
        num_states,
        num_groups,
        num_codes,
    )
    blocks = {
        "D": d,
        "PADDED_D": padded_d,
        "ROWS": max(1, min(32, 2048 // padded_d)),
        "SAMPLES": SAMPLES,
        "STATES": STATES_PER_PROGRAM,
    }
    grid = (max(num_groups, triton.cdiv(num_states, STATES_PER_PROGRAM)),)
    return Launch(prepare, grid, arguments, blocks, num_warps=4, fp_fusion=False)


def direct_launch(chunk: QueryChunk, plan: Plan) -> Launch:
    """Search all codes for every query."""
    direct = plan.direct
    rows, num_groups, _ = chunk.sizes
    blocks = {
        "D": chunk.d,
        "BLOCK_QUERIES": direct.block_queries,
        "BLOCK_CODES": direct.block_codes,
        "REGISTER_DIMS": direct.register_dims,
        "DIM_STEP": direct.dim_step,
        "SPLIT": plan.splits > 1,
        "INLINE_ASM": plan.inline_asm,
    }
    grid = (num_groups * triton.cdiv(rows, direct.block_queries), plan.splits)
    source = (*chunk.query_arguments, *chunk.code_arguments)
    arguments = (*source, chunk.workspace.key, *chunk.sizes, plan.codes_per_split)
    return Launch(direct_search, grid, arguments, blocks, direct.num_warps, fp_fusion=False)


def fallback_launch(chunk: QueryChunk, plan: Plan) -> Launch:
    """Search all codes for the queries without a certificate."""
    direct, workspace = plan.direct, chunk.workspace
    rows, num_groups, num_codes = chunk.sizes
    blocks = {
        "D": chunk.d,
        "BLOCK_QUERIES": direct.fallback_queries,
        "BLOCK_CODES": direct.fallback_codes,
        "REGISTER_DIMS": direct.register_dims,
        "DIM_STEP": direct.dim_step,
        "SLOTS": plan.slots,
        "FLAG_BLOCK": direct.flag_block,
        "INLINE_ASM": plan.inline_asm,
    }
    grid = (num_groups * triton.cdiv(rows, direct.flag_block), plan.fallback_splits)
    source = (*chunk.query_arguments, *chunk.code_arguments)
    codes_per_split = triton.cdiv(num_codes, plan.fallback_splits)
    arguments = (*source, *workspace.flags, workspace.key, *chunk.sizes, codes_per_split)
    return Launch(fallback, grid, arguments, blocks, direct.fallback_warps, fp_fusion=False)


def lane_constants(lanes: LaneLayout) -> dict[str, int]:
    """The layout of the lanes as kernels take it."""
    return {
        "OUTER_LANES": lanes.outer_lanes,
        "OUTER_MEMBERS": lanes.outer_members,
        "INNER_LANES": lanes.inner_lanes,
        "INNER_MEMBERS": lanes.inner_members,
    }


def first_pass_launch(chunk: QueryChunk, plan: Plan, config: FirstPassConfig) -> Launch:
    """The first pass over short vectors, or on CUDA cores."""
    workspace, direct, d = chunk.workspace, plan.direct, chunk.d
    rows, num_groups, _ = chunk.sizes
    steps = triton.cdiv(plan.codes_per_split, config.codes_per_step)
    blocks = {
        "D": d,
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_CODES": config.block_codes,
        "CELL_TILES": config.cell_tiles,
        **lane_constants(config.lanes),
        "ID_BITS": (steps - 1).bit_length(),
        "SLOTS": plan.slots,
        "CERTIFICATE": tuple(constants(config.form, d, config.products)),
        "INLINE_ASM": plan.inline_asm,
    }
    if config.form == "tensor_core":
        kernel = first_pass_tensor_core
        contiguous = chunk.codebook.is_contiguous()
        blocks |= {"DIMS": config.depth, "PRODUCTS": config.products, "CONTIGUOUS": contiguous}
    else:
        kernel = first_pass_fma
        blocks |= {"REGISTER_DIMS": direct.register_dims, "DIM_STEP": direct.dim_step, "UNROLL": config.unroll}
    source = (*chunk.query_arguments, *chunk.code_arguments)
    state = (*workspace.groups, *workspace.flags, *workspace.entries)
    arguments = (*source, *state, *chunk.sizes, plan.codes_per_split)
    grid = (num_groups * triton.cdiv(rows, config.block_queries), plan.splits)
    return Launch(kernel, grid, arguments, blocks, config.num_warps, fp_fusion=True)


def long_launches(chunk: QueryChunk, plan: LongPlan, config: FirstPassConfig, inline_asm: bool) -> Iterator[Launch]:
    """The first pass over long vectors: queries are packed once, codes are packed and searched chunk by chunk."""
    workspace, d, products = chunk.workspace, chunk.d, config.products
    rows, num_groups, num_codes = chunk.sizes
    padded_d = triton.next_power_of_2(d)
    query_blocks = triton.cdiv(rows, config.block_queries)
    packed_rows = query_blocks * config.block_queries
    queries = Packed.empty(plan.groups_per_chunk, packed_rows, d, products, workspace.center.device)
    codes = Packed.empty(plan.groups_per_chunk, plan.codes_per_chunk, d, products, workspace.center.device)
    pack = {
        "D": d,
        "PADDED_D": padded_d,
        "PITCH": pitch(d),
        "ROWS": min(16, 4096 // padded_d),
        "PRODUCTS": products,
    }
    steps = triton.cdiv(plan.codes_per_split, config.codes_per_step)
    blocks = {
        "PITCH": pitch(d),
        "DEPTHS": product_depths(d, config.depth),
        "PRODUCTS": products,
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_CODES": config.block_codes,
        "CELL_TILES": config.cell_tiles,
        **lane_constants(config.lanes),
        "ID_BITS": (steps - 1).bit_length(),
        "SLOTS": plan.slots,
        "STAGES": STAGES,
        "INLINE_ASM": inline_asm,
        "CERTIFICATE": tuple(constants("tensor_core", d, products)),
    }
    state = (workspace.scale, *workspace.flags, *workspace.entries)
    for first_group in range(0, num_groups, plan.groups_per_chunk):
        groups = min(plan.groups_per_chunk, num_groups - first_group)
        query_target = (*queries, workspace.uncertified)
        query_sizes = (first_group, rows, num_groups, packed_rows)
        arguments = (*chunk.query_arguments, *workspace.groups, *query_target, *query_sizes)
        grid = (packed_rows // pack["ROWS"], groups)
        yield Launch(pack_queries, grid, arguments, pack, PACK_WARPS, fp_fusion=True)
        for first_code in range(0, num_codes, plan.codes_per_chunk):
            left = min(plan.codes_per_chunk, num_codes - first_code)
            packed_codes = triton.cdiv(left, config.block_codes) * config.block_codes
            code_sizes = (first_group, first_code, num_codes, packed_codes)
            arguments = (*chunk.code_arguments, *workspace.groups, *codes.codes, *code_sizes)
            grid = (packed_codes // pack["ROWS"], groups)
            yield Launch(pack_codes, grid, arguments, pack, PACK_WARPS, fp_fusion=True)
            sizes = (rows, packed_rows, num_groups, first_group, first_code, packed_codes, plan.codes_per_split)
            arguments = (*queries, *codes.codes, *state, *sizes)
            grid = (groups * query_blocks, triton.cdiv(left, plan.codes_per_split))
            yield Launch(first_pass_long, grid, arguments, blocks, config.num_warps, fp_fusion=True)


def rerank_launch(chunk: QueryChunk, plan: Plan) -> Launch:
    """The exact distance to the candidates; index, gathered row and count."""
    workspace, config, d = chunk.workspace, plan.first_pass, chunk.d
    rows, num_groups, _ = chunk.sizes
    block_codes, cell_tiles, lanes, queries = 1, 1, LaneLayout(1, 1, 1, 1), 32
    if config is not None:
        block_codes, cell_tiles, lanes = config.block_codes, config.cell_tiles, config.lanes
        members = cell_tiles * lanes.outer_members * lanes.inner_members
        queries = max(1, min(16, CANDIDATES_PER_PROGRAM // members))
    blocks = {
        "D": d,
        "PADDED_D": min(triton.next_power_of_2(d), 64),
        "BLOCK_QUERIES": queries,
        "SLOTS": plan.slots,
        "BLOCK_CODES": block_codes,
        "CELL_TILES": cell_tiles,
        "OUTER_MEMBERS": lanes.outer_members,
        "INNER_LANES": lanes.inner_lanes,
        "INNER_MEMBERS": lanes.inner_members,
        "CANDIDATES": config is not None,
        "QUANTIZE": chunk.quantized is not None,
        "COUNT": chunk.count is not None,
    }
    # a kernel needs a tensor for every pointer: indices stand in for results that were not asked for
    results = (
        chunk.indices,
        chunk.indices if chunk.quantized is None else chunk.quantized,
        chunk.indices if chunk.count is None else chunk.count,
    )
    source = (*chunk.query_arguments, *chunk.code_arguments)
    state = (*workspace.flags, workspace.key, *workspace.entries)
    arguments = (*source, *state, *results, *chunk.sizes)
    grid = (num_groups * triton.cdiv(rows, queries),)
    return Launch(rerank, grid, arguments, blocks, num_warps=4, fp_fusion=False)
