"""Compile every shipped kernel ahead of time: no spills, bounded shared memory, bounded instructions per pair.

REVQ_AOT=all compiles every configuration for every card, which takes most of an hour; the default is a selection.
"""

import dataclasses
import os
from functools import cache

import pytest
import torch

from revq_kernels import triton

if triton.interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if triton.unavailable("cuda") is not None:
    pytest.skip(f"no Triton: {triton.unavailable('cuda')}", allow_module_level=True)

from revq_kernels.triton import aot, launches
from revq_kernels.triton import plan as planning
from revq_kernels.triton.launches import Launch

SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""Kilobytes of shared memory that one program may use."""

FEW = [
    *(("sm_90", "tensor_core", d, torch.float32, True) for d in (4, 8, 16, 64, 256)),
    *(("sm_90", "tensor_core", d, torch.float32, False) for d in (4, 8)),
    ("sm_90", "tensor_core", 8, torch.bfloat16, True),
    *(("sm_90", "fma", d, torch.float32, True) for d in (2, 4, 8, 64)),
    *(("sm_90", "direct", d, torch.float32, True) for d in (4, 8, 64)),
    *((target, "tensor_core", d, torch.float32, True) for target in SHARED if target != "sm_90" for d in (4, 8, 256)),
    *((target, form, 8, torch.float32, True) for target in SHARED if target != "sm_90" for form in ("fma", "direct")),
]
"""The cases of `make test`."""

ALL = [
    (target, form, d, dtype, contiguous)
    for target in (*SHARED, "gfx950")
    for form in planning.FORMS
    for d in (1, 2, 3, 4, 6, 8, 12, 16, 17, 32, 64, 100, 128, 256, 512)
    for dtype, contiguous in (
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float16, True),
        (torch.float32, False),
    )
    if not (form == "tensor_core" and d < planning.MIN_TENSOR_CORE_D)
]
CASES = ALL if os.environ.get("REVQ_AOT") == "all" else FEW


def launches_of(
    target: str, form: str, d: int, dtype: torch.dtype, contiguous: bool, products: int = 1
) -> list[Launch]:
    """The launches of a search: 256 queries in each of 512 groups, 16,384 codes, a card with 132 multiprocessors."""
    rows, num_groups, num_codes = 256, 512, 16384
    x = torch.empty(rows, num_groups, d, device="meta", dtype=dtype)
    codebook = torch.empty(num_groups, num_codes, d, device="meta", dtype=dtype)
    if not contiguous:
        codebook = torch.empty(num_groups, d, num_codes, device="meta", dtype=dtype).transpose(1, 2)
    card = planning.Target(target, 132, "a card")
    first_pass = None
    if products == 3:
        default = planning.default_first_pass(form, d, target, contiguous=False)  # the smaller tile
        first_pass = dataclasses.replace(default, products=3)
    plan = planning.make_plan(rows, num_groups, num_codes, d, card, form, first_pass, contiguous)
    indices = torch.empty(rows, num_groups, dtype=torch.int64, device="meta")
    count = torch.empty(num_groups, num_codes, dtype=torch.int64, device="meta")
    chunk = next(launches.query_chunks(x, codebook, indices, x, count, plan))
    return list(launches.launches(chunk, plan))


@cache
def compiled(target: str, form: str, d: int, kernel: str, products: int = 1) -> tuple[aot.Compiled, Launch]:
    """The kernel of that name among the launches for float32 inputs."""
    launch = next(x for x in launches_of(target, form, d, torch.float32, True, products) if x.kernel.__name__ == kernel)
    return aot.compile_launch(launch, target), launch


@pytest.mark.parametrize(("target", "form", "d", "dtype", "contiguous"), CASES)
def test_nothing_shipped_spills(target, form, d, dtype, contiguous):
    for launch in launches_of(target, form, d, dtype, contiguous):
        kernel = aot.compile_launch(launch, target)
        assert kernel.stack == 0, (
            f"{launch.kernel.__name__}: {kernel.stack} bytes spilled at {kernel.registers} registers"
        )
        assert kernel.shared <= SHARED.get(target, 64) * 1024


@pytest.mark.parametrize("kernel", ["rerank", "fallback", "direct_search"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_exact_distance_is_neither_fused_nor_flushed(kernel, target):
    form = "direct" if kernel == "direct_search" else "tensor_core"
    found = compiled(target, form, 8, kernel)[0]
    opcodes = {opcode for _, opcode, _ in aot.instructions(found.sass)}
    assert "FADD" in opcodes and "FMUL" in opcodes
    assert not [opcode for opcode in opcodes if opcode.startswith("FFMA")]
    assert not [opcode for opcode in opcodes if opcode.startswith(("FADD.FTZ", "FMUL.FTZ", "FMNMX.FTZ"))]


def per_pair(kernel: aot.Compiled, launch: Launch, inner_tiles: int) -> float:
    """Instructions per (query, code) pair: the loop over tiles and the loop over steps around it, times their trips.

    ``inner_tiles`` tiles are one trip of the inner loop.  Instructions outside loops are not counted.
    """
    sizes = launch.constants
    pairs = sizes["BLOCK_QUERIES"] * sizes["BLOCK_CODES"] // (32 * launch.num_warps)
    found = aot.loops(kernel.sass)
    inner = next(loop for loop in found if loop.depth == 1)
    outer = next(loop for loop in found if loop.depth == 0 and loop.start <= inner.start and loop.end >= inner.end)
    trips = [{inner: sizes["CELL_TILES"] // inner_tiles, outer: 1}.get(loop, 0) for loop in found]
    return aot.instructions_per_pair(kernel, trips, sizes["CELL_TILES"] * pairs)


@pytest.mark.parametrize(("d", "products", "most"), [(4, 1, 1.8), (8, 1, 1.8), (8, 3, 3.0)])
def test_instructions_of_the_tensor_core_form(d, products, most):
    assert per_pair(*compiled("sm_90", "tensor_core", d, "first_pass_tensor_core", products), inner_tiles=1) <= most


@pytest.mark.parametrize(("d", "most"), [(64, 3.2), (256, 8)])
def test_instructions_of_the_tensor_core_form_for_long_vectors(d, most):
    """One loop over tiles: the update of the lanes, taken once per cell, is counted as if taken in every tile."""
    kernel, launch = compiled("sm_90", "tensor_core", d, "first_pass_long")
    sizes = launch.constants
    pairs = sizes["BLOCK_QUERIES"] * sizes["BLOCK_CODES"] // (32 * launch.num_warps)
    assert max(loop.own for loop in aot.loops(kernel.sass)) / pairs <= most


@pytest.mark.parametrize(("d", "most"), [(4, 6.7), (8, 11)])
def test_instructions_of_the_fma_form(d, most):
    kernel, launch = compiled("sm_90", "fma", d, "first_pass_fma")
    assert per_pair(kernel, launch, inner_tiles=launch.constants["UNROLL"]) <= most


@pytest.mark.parametrize(("d", "most"), [(4, 17), (8, 31)])
def test_instructions_of_the_direct_form(d, most):
    kernel, launch = compiled("sm_90", "direct", d, "direct_search")
    pairs = launch.constants["BLOCK_QUERIES"] * launch.constants["BLOCK_CODES"] // (32 * launch.num_warps)
    assert len(aot.loops(kernel.sass)) == 1
    assert aot.instructions_per_pair(kernel, [1], pairs) <= most


def test_loops_are_found_and_weighted():
    sass = "\n".join(
        f"        /*{address:04x}*/                   {text} ;"
        for address, text in enumerate(
            [
                "MOV R1, R2",
                "FADD R1, R1, R2",
                "FMUL R3, R1, R1",
                "@P0 BRA 0x20",
                "FADD R1, R1, R3",
                "@P1 BRA 0x10",
                "EXIT",
            ]
        )
        for address in [address * 16]
    )
    outer, inner = aot.loops(sass)
    assert (outer.depth, outer.own, inner.depth, inner.own) == (0, 3, 1, 2)
    kernel = aot.Compiled("sm_90", 1, 0, 0, {})
    kernel.__dict__["sass"] = sass
    assert aot.instructions_per_pair(kernel, [1, 10], 4) == (3 + 20) / 4
    with pytest.raises(ValueError, match="2 loops were found and 1 trip counts given"):
        aot.instructions_per_pair(kernel, [1], 4)


def test_the_workspace_is_bounded():
    for shape in ((256, 512, 16384, 4), (128, 256, 262144, 8), (256, 1, 262144, 8), (2**20, 1, 262144, 8)):
        for form in planning.FORMS:
            plan = planning.make_plan(*shape, planning.Target("sm_90", 132, "a card"), form)
            queries = min(shape[0], plan.rows_per_chunk) * shape[1]
            assert queries * (20 + 8 * plan.slots) <= planning.WORKSPACE_BYTES
            assert plan.splits * plan.codes_per_split >= shape[2] > (plan.splits - 1) * plan.codes_per_split


def test_the_plan_for_long_vectors_fits_the_workspace():
    for rows, num_groups, num_codes, d in (
        (1, 1, 1024, 17),
        (1_000_000, 1, 262_144, 512),
        (65536, 1, 16384, 256),
        (4096, 8, 8192, 64),
        (300, 64, 1000, 32),
    ):
        for products in (1, 3):
            lanes = planning.LaneLayout(8, 2, 4, 2)
            config = planning.FirstPassConfig("tensor_core", 128, 128, lanes, 8, 8, products, depth=128)
            plan = planning.plan_long(rows, num_groups, num_codes, d, config, 132)
            assert plan.codes_per_chunk % 128 == 0 and plan.codes_per_split % 1024 == 0
            assert plan.codes_per_chunk >= num_codes or plan.codes_per_chunk % 1024 == 0
            assert plan.splits * plan.codes_per_split >= min(plan.codes_per_chunk, num_codes)
            vector = 2 * planning.pitch(d) * (2 if products == 3 else 1)
            codes = plan.groups_per_chunk * plan.codes_per_chunk * (vector + 8)
            state = num_groups * (20 + 8 * plan.slots) + plan.groups_per_chunk * (vector + 8)
            assert codes + state * min(plan.rows_per_chunk, rows) <= 64 * 2**20


def test_product_depths_add_up_to_the_pitch():
    for d in range(17, 513):
        for depth in (32, 64, 128):
            depths = planning.product_depths(d, depth)
            assert sum(depths) == planning.pitch(d) >= d
            assert all(part & (part - 1) == 0 and 16 <= part <= depth for part in depths)


@pytest.mark.parametrize(("rows", "num_groups", "num_codes"), [(256, 1, 262144), (128, 256, 262144), (256, 512, 16384)])
def test_every_multiprocessor_gets_two_programs(rows, num_groups, num_codes):
    plan = planning.make_plan(rows, num_groups, num_codes, 8, planning.Target("sm_90", 132, "a card"))
    assert plan.form == "tensor_core"
    assert num_groups * -(-rows // plan.first_pass.block_queries) * plan.splits >= 1.9 * 132


def test_the_form_follows_the_problem_and_the_card():
    def form(arch: str, k: int = 65536, d: int = 8) -> str:
        return planning.make_plan(1024, 8, k, d, planning.Target(arch, 100, "a card")).form

    assert [form("sm_90"), form("sm_80"), form("sm_75"), form("gfx942")] == ["tensor_core", "tensor_core", "fma", "fma"]
    assert [form("sm_90", d=2), form("sm_90", d=513), form("sm_90", k=300)] == ["fma", "direct", "direct"]


def test_a_measured_card_overrules_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(planning, "MEASURED", tmp_path)
    card = planning.Target("sm_90", 132, "Some Card 9000 (SXM)")
    path = planning.measured_path(card.card)
    assert path.name == "some-card-9000-sxm.json"
    path.write_text(
        '{"configs": {"tensor_core": {"8": {"form": "tensor_core", "block_queries": 64, "block_codes": 64,'
        ' "lanes": [8, 1, 4, 2], "cell_tiles": 16, "num_warps": 4, "products": 1, "depth": 8, "unroll": 1, "ms": 1.0}}}}'
    )
    first_pass = planning.make_plan(256, 256, 65536, 8, card).first_pass
    assert first_pass.block_queries == 64 and first_pass.lanes.outer_lanes == 8
    assert planning.make_plan(256, 256, 65536, 4, card).first_pass.block_queries == 128
