"""How the search is launched, as data: block sizes by form, and a plan for one problem on one device.

The defaults follow from registers and shared memory (docs/kernels.md has the counts).  A card that was measured can
have a file of its own, ``configs/<card>.json``, which `revq_kernels.triton.tune` writes.
"""

import json
import re
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from revq_kernels.triton.blocks import MIN_LONG_D, DirectConfig, FirstPassConfig, default_direct, default_first_pass
from revq_kernels.triton.long_plan import LongPlan, plan_long

WORKSPACE = 64 * 2**20
"""Bytes that the state and the candidates of the queries in flight may take; more queries go in several rounds."""

MAX_FIRST_PASS_D = 512
MIN_TENSOR_CORE_D = 4
MAX_STEPS = 256
"""Steps of one program: their number stands in the low 8 bits of a lane's key."""

FORMS = ("tensor_core", "fma", "direct")
MEASURED = Path(__file__).with_name("configs")


class Target(NamedTuple):
    """What a plan depends on."""

    arch: str
    """"sm_90", "gfx942", or "interpreter"."""
    multiprocessors: int
    card: str


class Plan(NamedTuple):
    """What runs for one problem; `first_pass` is None for the direct form."""

    first_pass: FirstPassConfig | None
    direct: DirectConfig
    splits: int
    """Programs that share the codes of one block of queries."""
    codes_per_split: int
    fallback_splits: int
    slots: int
    """Candidate cells that a query can list."""
    rows_per_round: int
    inline_asm: bool
    """Whether PTX may stand in the kernels: not in the interpreter, nor on AMD."""
    reason: str
    long: LongPlan | None = None
    """How packed rows are cut up, for tensor cores and long vectors."""

    @property
    def form(self) -> str:
        """One of FORMS."""
        return "direct" if self.first_pass is None else self.first_pass.form


@lru_cache
def target_of(device: torch.device) -> Target:
    """The device's facts; CPU tensors are interpreted."""
    if device.type == "cpu":
        return Target("interpreter", 1, "interpreter")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target(properties.gcnArchName.partition(":")[0], properties.multi_processor_count, properties.name)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, properties.name)


def measured_path(card: str) -> Path:
    """The file of a card's measured configurations."""
    return MEASURED / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


@lru_cache
def measured(card: str) -> dict[str, Any]:
    """The configurations measured on this card, by form and code dimension; empty where there is no file."""
    path = measured_path(card)
    return json.loads(path.read_text())["configs"] if path.is_file() else {}


def choose_form(queries: int, num_codes: int, d: int, arch: str) -> tuple[str, str]:
    """(form, why) for ``queries`` queries in all groups together."""
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


@lru_cache(maxsize=1024)
def make_plan(rows: int, num_groups: int, num_codes: int, d: int, target: Target, form: str | None = None,
              first_pass: FirstPassConfig | None = None, contiguous: bool = True) -> Plan:  # fmt: skip
    """The plan for x ``[rows, G, d]`` and a codebook ``[G, K, d]`` that is ``contiguous`` or not.

    ``form`` or ``first_pass`` overrules the choice.
    """
    reason = "asked for by name"
    if first_pass is not None:
        form = first_pass.form
    elif form is None:
        form, reason = choose_form(rows * num_groups, num_codes, d, target.arch)
    direct = default_direct(d)
    asm = target.arch.startswith("sm_")
    if form == "direct":
        splits, per_split = _split(rows, num_groups, num_codes, direct.block_queries, direct.block_codes, target, 8)
        return Plan(None, direct, splits, per_split, 1, 1, _rows_per_round(num_groups, 1), asm, reason)
    first_pass = (
        first_pass or _measured_first_pass(form, d, target) or default_first_pass(form, d, target.arch, contiguous)
    )
    fallback_splits, _ = _split(rows, num_groups, num_codes, direct.flag_block, direct.fallback_codes, target, 4)
    if form == "tensor_core" and d >= MIN_LONG_D:
        long = plan_long(
            rows, num_groups, num_codes, d, first_pass.parts, first_pass.block_queries, first_pass.block_codes,
            first_pass.cell_tiles, target.multiprocessors,
        )  # fmt: skip
        shared = (long.splits, long.codes_per_split, fallback_splits, long.slots, long.rows_per_round)
        return Plan(first_pass, direct, *shared, asm, reason, long)
    step = first_pass.codes_per_step
    splits, per_split = _split(rows, num_groups, num_codes, first_pass.block_queries, step, target, 1)
    if per_split > step * MAX_STEPS:
        per_split = step * MAX_STEPS
        splits = -(-num_codes // per_split)
    slots = -(-(2 * splits + 6) // 8) * 8
    return Plan(
        first_pass, direct, splits, per_split, fallback_splits, slots, _rows_per_round(num_groups, slots), asm, reason
    )  # fmt: skip


def _split(rows: int, num_groups: int, num_codes: int, block_queries: int, step: int, target: Target, least: int
           ) -> tuple[int, int]:  # fmt: skip
    """(programs, codes of each) that share one block of queries, so that every multiprocessor has two in turn.

    A program gets a multiple of ``step`` codes, and at least ``least`` steps.
    """
    programs = num_groups * -(-rows // block_queries)
    wanted = -(-2 * target.multiprocessors // programs)
    steps = max(least, -(-num_codes // (step * wanted)))
    return -(-num_codes // (steps * step)), steps * step


def _rows_per_round(num_groups: int, slots: int) -> int:
    bytes_per_query = 20 + 8 * slots
    return max(256, WORKSPACE // (bytes_per_query * num_groups) // 256 * 256)


def _measured_first_pass(form: str, d: int, target: Target) -> FirstPassConfig | None:
    found = measured(target.card).get(form, {}).get(str(d))
    if found is None:
        return None
    names = [field.name for field in fields(FirstPassConfig)]
    return FirstPassConfig(**{name: found[name] for name in names} | {"lanes": tuple(found["lanes"])})
