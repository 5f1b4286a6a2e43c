"""Plan one search as data: the form, its block sizes, and how queries and codes are divided among programs.

The default block sizes follow from registers and shared memory (docs/gpu.md): each is the largest tile whose scores,
lanes and operands fit without a spill, which tests/kernels/test_aot.py checks by compiling them all.  A card that was
measured can have a file of its own, ``configs/<card>.json``, written by `revq_kernels.triton.tune`.
"""

import json
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

WORKSPACE_BYTES = 64 * 2**20
"""Limit for the state and the candidates of the queries in flight; more queries go in several chunks."""

PACKED_CODE_BYTES = 24 * 2**20
"""The share of the workspace for packed codes (long vectors)."""

PACKED_QUERY_BYTES = 40 * 2**20
"""The share of the workspace for packed queries and the state of every query (long vectors)."""

MAX_FIRST_PASS_D = 512
MIN_TENSOR_CORE_D = 4
MIN_LONG_D = 17
"""From this d on, tensor cores read packed rows (first_pass_long.py): rounding the codes once per block of queries,
inside the first pass, would take longer than packing them once."""

MAX_STEPS = 256
"""Steps of one program: the step's number is stored in the low 8 bits of a lane's entry."""

FORMS = ("tensor_core", "fma", "direct")
MEASURED = Path(__file__).with_name("configs")


class LaneLayout(NamedTuple):
    """How the columns (codes) of a tile are divided into lanes, see candidates.py.

    ``column = ((outer_lane * outer_members + outer_member) * inner_lanes + inner_lane) * inner_members + inner_member``
    """

    outer_lanes: int
    outer_members: int
    inner_lanes: int
    inner_members: int


@dataclass(frozen=True)
class DirectConfig:
    """Block sizes of the direct form, and of the same search as a fallback."""

    block_queries: int = 16
    block_codes: int = 128
    num_warps: int = 4
    register_dims: int = 16
    """Up to this d the elements of the queries stay in registers; above, every tile of codes loads them again."""
    dim_step: int = 4
    fallback_queries: int = 4
    fallback_codes: int = 256
    fallback_warps: int = 4
    flag_block: int = 256


@dataclass(frozen=True)
class FirstPassConfig:
    """Block sizes of a first pass."""

    form: str
    block_queries: int
    block_codes: int
    lanes: LaneLayout
    cell_tiles: int
    """Tiles of codes whose scores share one entry per lane."""
    num_warps: int
    products: int = 1
    """float16 products that approximate one float32 product: 1, or 3 (hi*hi + hi*lo + lo*hi; tensor cores only)."""
    depth: int = 0
    """Elements of a vector that one matrix product takes, a power of two (tensor cores)."""
    unroll: int = 1
    """Tiles in a row without a branch between them (fma)."""

    @property
    def codes_per_step(self) -> int:
        """Codes between two updates of the lanes."""
        return self.block_codes * self.cell_tiles


class Target(NamedTuple):
    """What a plan depends on besides the problem."""

    arch: str
    """"sm_90", "gfx942", or "interpreter"."""
    multiprocessors: int
    card: str


class LongPlan(NamedTuple):
    """How a search over packed rows is divided into chunks and splits."""

    groups_per_chunk: int
    codes_per_chunk: int
    """Per group: a multiple of the codes of one step, or all codes, in whole tiles."""
    splits: int
    codes_per_split: int
    slots: int
    rows_per_chunk: int


class Plan(NamedTuple):
    """What runs for one problem; `first_pass` is None for the direct form."""

    first_pass: FirstPassConfig | None
    direct: DirectConfig
    splits: int
    """Programs that share the codes for one block of queries."""
    codes_per_split: int
    fallback_splits: int
    slots: int
    """Candidate cells that a query can list."""
    rows_per_chunk: int
    inline_asm: bool
    """Whether the kernels may contain PTX: not in the interpreter, nor on AMD."""
    reason: str
    long: LongPlan | None = None
    """Set when the first pass reads packed rows: tensor cores with d >= MIN_LONG_D."""

    @property
    def form(self) -> str:
        """One of FORMS."""
        return "direct" if self.first_pass is None else self.first_pass.form


@lru_cache
def target_of(device: torch.device) -> Target:
    """Architecture and size of the device; CPU tensors are interpreted."""
    if device.type == "cpu":
        return Target("interpreter", 1, "interpreter")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target(properties.gcnArchName.partition(":")[0], properties.multi_processor_count, properties.name)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, properties.name)


@lru_cache(maxsize=1024)
def make_plan(
    rows: int,
    num_groups: int,
    num_codes: int,
    d: int,
    target: Target,
    form: str | None = None,
    first_pass: FirstPassConfig | None = None,
    contiguous: bool = True,
) -> Plan:
    """The plan for x ``[rows, G, d]`` and a codebook ``[G, K, d]`` that is ``contiguous`` or not.

    ``form`` or ``first_pass`` overrides the default choice.
    """
    reason = "asked for by name"
    if first_pass is not None:
        form = first_pass.form
    elif form is None:
        form, reason = choose_form(rows * num_groups, num_codes, d, target.arch)
    direct = default_direct(d)
    asm = target.arch.startswith("sm_")
    if form == "direct":
        splits, per_split = _split_codes(
            rows, num_groups, num_codes, direct.block_queries, direct.block_codes, target, min_steps=8
        )
        return Plan(None, direct, splits, per_split, 1, 1, _rows_per_chunk(num_groups, 1), asm, reason)
    if first_pass is None:
        first_pass = _measured_first_pass(form, d, target) or default_first_pass(form, d, target.arch, contiguous)
    fallback_splits, _ = _split_codes(
        rows, num_groups, num_codes, direct.flag_block, direct.fallback_codes, target, min_steps=4
    )
    if form == "tensor_core" and d >= MIN_LONG_D:
        long = plan_long(rows, num_groups, num_codes, d, first_pass, target.multiprocessors)
        shared = (long.splits, long.codes_per_split, fallback_splits, long.slots, long.rows_per_chunk)
        return Plan(first_pass, direct, *shared, asm, reason, long)
    step = first_pass.codes_per_step
    splits, per_split = _split_codes(rows, num_groups, num_codes, first_pass.block_queries, step, target, min_steps=1)
    if per_split > step * MAX_STEPS:
        per_split = step * MAX_STEPS
        splits = _divide_up(num_codes, per_split)
    slots = _round_up(2 * splits + 6, 8)
    rows_per_chunk = _rows_per_chunk(num_groups, slots)
    return Plan(first_pass, direct, splits, per_split, fallback_splits, slots, rows_per_chunk, asm, reason)


def choose_form(queries: int, num_codes: int, d: int, arch: str) -> tuple[str, str]:
    """(form, reason) for ``queries`` queries in all groups together."""
    if d > MAX_FIRST_PASS_D:
        return "direct", f"d={d} is above {MAX_FIRST_PASS_D}"
    if num_codes < 512 or queries * num_codes < 2**22:
        return "direct", "too few codes for a first pass to pay"
    if not arch.startswith("sm_"):
        return "fma", f"tensor cores of {arch} are not covered by the bound"
    if int(arch.removeprefix("sm_")) < 80:
        return "fma", f"{arch} is older than sm_80"
    if d < MIN_TENSOR_CORE_D:
        return "fma", f"d={d} is below {MIN_TENSOR_CORE_D}, where tensor cores have nothing to gain"
    return "tensor_core", f"{arch}, d={d}"


def _split_codes(
    rows: int, num_groups: int, num_codes: int, block_queries: int, step: int, target: Target, min_steps: int
) -> tuple[int, int]:
    """(splits, codes per split) for one block of queries, so that every multiprocessor gets two programs.

    A split is a multiple of ``step`` codes, and at least ``min_steps`` steps.
    """
    programs = num_groups * _divide_up(rows, block_queries)
    wanted = _divide_up(2 * target.multiprocessors, programs)
    steps = max(min_steps, _divide_up(num_codes, step * wanted))
    return _divide_up(num_codes, steps * step), steps * step


def _rows_per_chunk(num_groups: int, slots: int) -> int:
    bytes_per_query = 20 + 8 * slots
    return max(256, WORKSPACE_BYTES // (bytes_per_query * num_groups) // 256 * 256)


def plan_long(
    rows: int, num_groups: int, num_codes: int, d: int, config: FirstPassConfig, multiprocessors: int
) -> LongPlan:
    """The plan for ``rows`` queries of each group, such that packed rows and state fit the workspace.

    A chunk packs the queries of some groups, then as many of their codes at a time as fit; the state of the queries
    carries over from one chunk of codes to the next.
    """
    block_queries, step = config.block_queries, config.codes_per_step
    packed_bytes = 2 * pitch(d) * (2 if config.products == 3 else 1) + 8
    codes = _round_up(num_codes, config.block_codes)
    if codes * packed_bytes > PACKED_CODE_BYTES:
        codes = min(codes, max(step, PACKED_CODE_BYTES // packed_bytes // step * step))
    groups = min(num_groups, max(1, PACKED_CODE_BYTES // (codes * packed_bytes)))
    code_chunks = _divide_up(num_codes, codes)
    bytes_per_row = groups * packed_bytes + num_groups * 20
    # the number of splits depends on the rows and the slots on the splits: start from a guess of 16 slots per query
    guess = max(block_queries, PACKED_QUERY_BYTES // (bytes_per_row + 128 * num_groups))
    query_blocks = _divide_up(min(rows, guess), block_queries)
    wanted = _divide_up(2 * multiprocessors, groups * query_blocks)
    steps = min(MAX_STEPS, max(1, _divide_up(codes, step * wanted)))
    splits = _divide_up(codes, steps * step)
    slots = _round_up(2 * splits * code_chunks + 6, 8)
    most = PACKED_QUERY_BYTES // (bytes_per_row + 8 * slots * num_groups)
    return LongPlan(groups, codes, splits, steps * step, slots, max(block_queries, most // 256 * 256))


def pitch(d: int) -> int:
    """Elements of a packed row: d rounded up to 16, the depth of one tensor core instruction."""
    return _round_up(d, 16)


def product_depths(d: int, depth: int) -> tuple[int, ...]:
    """The depths of the matrix products that cover a packed row: powers of two, at most ``depth``, sum `pitch`."""
    left, depths = pitch(d), []
    while left:
        depths.append(min(depth, 1 << (left.bit_length() - 1)))
        left -= depths[-1]
    return tuple(depths)


def default_direct(d: int) -> DirectConfig:
    """Half the tile for 8 < d <= 16, where the elements of the queries take the registers."""
    return DirectConfig(block_codes=64, fallback_codes=128) if 8 < d <= 16 else DirectConfig()


def default_first_pass(form: str, d: int, arch: str, contiguous: bool = True) -> FirstPassConfig:
    """The default for "tensor_core" or "fma"; ``contiguous`` says whether the codebook is."""
    if form == "fma":
        if d <= 8:
            return FirstPassConfig(form, 64, 32, LaneLayout(1, 1, 32, 1), 16 if d <= 4 else 32, 4, unroll=2)
        if d <= 16:
            return FirstPassConfig(form, 32, 32, LaneLayout(1, 1, 32, 1), 16, 4)
        return FirstPassConfig(form, 8, 512, LaneLayout(1, 4, 128, 1), 4, 4)
    if d >= MIN_LONG_D:
        queries, codes, cell_tiles, warps = _long_tile(d, "sm_90" if arch == "interpreter" else arch)
        members = {32: (4, 1, 8, 1), 64: (8, 1, 4, 2), 128: (8, 2, 4, 2), 256: (8, 4, 4, 2)}[codes]
        return FirstPassConfig(form, queries, codes, LaneLayout(*members), cell_tiles, warps, depth=128)
    depth = max(2, 1 << (d - 1).bit_length())
    if arch.startswith("gfx"):
        return FirstPassConfig(form, 64, 64, LaneLayout(8, 1, 4, 2), 16, 4, depth=depth)
    if arch in ("sm_80", "sm_86", "sm_89"):
        return FirstPassConfig(form, 128, 128, LaneLayout(2, 2, 16, 2), 16, 8, depth=depth)
    if arch in ("sm_90", "interpreter") and contiguous and 4 <= d <= 8:
        return FirstPassConfig(form, 128, 256, LaneLayout(8, 4, 4, 2), 8, 8, depth=depth)
    return FirstPassConfig(form, 128, 128, LaneLayout(8, 2, 4, 2), 16, 8, depth=depth)


def _long_tile(d: int, arch: str) -> tuple[int, int, int, int]:
    """(queries, codes, cell tiles, warps) for packed rows; shared memory holds the queries and two tiles of codes."""
    if arch.startswith("gfx"):
        return (64, 32, 16, 4) if d > 256 else (64, 64, 16, 4) if d > 128 else (64, 128, 8, 8)
    if arch in ("sm_80", "sm_86", "sm_89"):
        if d > 256:
            return (64, 64, 16, 4) if arch == "sm_80" else (32, 64, 16, 4)
        return (128, 64, 16, 8) if d > 128 else (128, 128, 8, 8)
    if d > 256:
        return 64, 64, 16, 4
    if arch == "sm_90":
        return (128, 256, 4, 8) if d <= 128 else (128, 128, 8, 8)
    return 64, 128, 8, 4


def measured_path(card: str) -> Path:
    """The file of a card's measured configurations."""
    return MEASURED / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


@lru_cache
def measured(card: str) -> dict[str, Any]:
    """The configurations measured on this card, by form and d; empty where there is no file."""
    path = measured_path(card)
    return json.loads(path.read_text())["configs"] if path.is_file() else {}


def _measured_first_pass(form: str, d: int, target: Target) -> FirstPassConfig | None:
    found = measured(target.card).get(form, {}).get(str(d))
    if found is None:
        return None
    names = [field.name for field in fields(FirstPassConfig)]
    return FirstPassConfig(**{name: found[name] for name in names} | {"lanes": LaneLayout(*found["lanes"])})


def _divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
