"""The first pass over packed rows under Triton's interpreter: pack, search, fallback and settle give the contract's index.

`make test` runs this in a process of its own, since TRITON_INTERPRET=1 must stand before Triton is imported.
"""

import pytest
import torch
from torch import Tensor

from revq_kernels import triton
from revq_kernels.testing.problems import assert_same_codes

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own: `make test` does that", allow_module_level=True)

from revq_kernels.triton.addressing import grouped_rows
from revq_kernels.triton.blocks import DirectConfig, FirstPassConfig
from revq_kernels.triton.candidates import settle
from revq_kernels.triton.direct import fallback
from revq_kernels.triton.launches import State
from revq_kernels.triton.long_launch import Packed, long_launches
from revq_kernels.triton.long_plan import pitch, plan_long
from revq_kernels.triton.pack import FAR, pack_codes, pack_queries
from revq_kernels.triton.prepare import SAMPLES, prepare

QUERIES, CODES, CELL_TILES = 16, 32, 2
DIMS = (17, 33, 64, 100, 256, 512)


def run(x: Tensor, codebook: Tensor, parts: int = 1, **changes) -> tuple[Tensor, Tensor]:
    """(indices ``[..., G]``, settled bool ``[N, G]``)."""
    rows, (num_groups, num_codes, d) = grouped_rows(x), codebook.shape
    chosen = FirstPassConfig("tensor_core", QUERIES, CODES, (4, 1, 4, 2), CELL_TILES, 4, parts, depth=128)
    plan = plan_long(rows.count, num_groups, num_codes, d, parts, QUERIES, CODES, CELL_TILES, 1)._replace(**changes)
    state = State.empty(rows.count * num_groups, plan.slots, num_groups, d, x.device)
    direct, size = DirectConfig(), 1 << (d - 1).bit_length()
    sizes = (rows.count, num_groups, num_codes)
    prepare[(max(num_groups, -(-rows.count * num_groups // 1024)),)](
        codebook, *codebook.stride(), state.center, state.scale, state.limit, state.found, state.unsettled, state.key,
        rows.count * num_groups, num_groups, num_codes,
        D=d, PADDED_D=size, ROWS=max(1, min(32, 2048 // size)), SAMPLES=SAMPLES, STATES=1024,
    )  # fmt: skip
    source = (*rows.arguments(), codebook, *codebook.stride())
    for launch in long_launches(source, state, sizes, plan, chosen, 2, False):
        launch.run()
    settled = (state.unsettled == 0) & (state.limit < torch.inf) & (state.found <= plan.slots)
    fallback[(num_groups * -(-rows.count // direct.flag_block), 1)](
        *source, state.limit, state.found, state.unsettled, state.key, *sizes, num_codes,
        D=d, BLOCK_QUERIES=4, BLOCK_CODES=256, REGISTER_DIMS=16, DIM_STEP=4, SLOTS=plan.slots, INLINE_ASM=False,
        FLAG_BLOCK=direct.flag_block,
    )  # fmt: skip
    indices = torch.full((rows.count, num_groups), -7)
    settle[(num_groups * -(-rows.count // 16),)](
        *source, state.limit, state.found, state.unsettled, state.key, state.entry_score, state.entry_first,
        indices, indices, indices, *sizes,
        D=d, PADDED_D=64, BLOCK_QUERIES=16, BLOCK_CODES=CODES, CELL_TILES=CELL_TILES, B=1, C=4, E=2, SLOTS=plan.slots,
        CANDIDATES=True, QUANTIZE=False, COUNT=False,
    )  # fmt: skip
    return indices.view(x.shape[:-1]), settled.view(rows.count, num_groups)


def gaussian(n: int, g: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, g, d, generator=generator), torch.randn(g, k, d, generator=generator)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("d", DIMS)
def test_index_is_the_contracts(d, parts):
    x, codebook = gaussian(21, 2, 203, d) if d <= 64 else gaussian(10, 1, 135, d)
    indices, settled = run(x, codebook, parts)
    assert_same_codes(indices, x, codebook)
    assert settled.float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, codebook = gaussian(12, 2, 110, 40)
    for left, right in ((x.to(dtype), codebook.to(dtype)), (x, codebook.to(dtype)), (x.to(dtype), codebook)):
        indices, settled = run(left, right)
        assert_same_codes(indices, left, right)
        assert settled.float().mean() > 0.95


def test_any_strides():
    x, codebook = gaussian(40, 4, 180, 70)
    x, codebook = x[::2, ::2, 1::3], codebook[::2, ::2].transpose(1, 2).contiguous().transpose(1, 2)[..., 1::3]
    indices, _ = run(x, codebook)
    assert_same_codes(indices, x, codebook)


def test_twins_take_no_slow_path():
    x, codebook = gaussian(32, 1, 600, 33)
    codebook[:, 300:450] = codebook[:, torch.randperm(300)[:150]]
    mixed = codebook[:, torch.randperm(600)]
    indices, settled = run(x, mixed)
    assert_same_codes(indices, x, mixed)
    assert settled.all()


def test_equal_codes():
    x, _ = gaussian(20, 2, 1, 20)
    codebook = torch.ones(2, 300, 20)
    indices, settled = run(x, codebook)
    assert_same_codes(indices, x, codebook)
    assert not settled.any()


def test_an_offset_costs_nothing():
    x, codebook = gaussian(20, 1, 200, 48)
    indices, settled = run(x + 1e4, codebook + 1e4)
    assert_same_codes(indices, x + 1e4, codebook + 1e4)
    assert settled.float().mean() > 0.9


@pytest.mark.parametrize(
    ("value", "parts"), [(torch.nan, 1), (torch.nan, 3), (torch.inf, 1), (-torch.inf, 3), (1e9, 3), (1e30, 1)]
)
def test_codes_and_queries_far_outside(value, parts):
    x, codebook = gaussian(16, 2, 150, 24)
    x[3, 1, 5] = value
    indices, settled = run(x, codebook, parts)
    assert_same_codes(indices, x, codebook)
    assert not settled[3, 1] and settled.float().mean() > 0.9
    codebook[1, 140, 7] = value
    codebook[1, 145] = value
    indices, settled = run(x, codebook, parts)
    assert_same_codes(indices, x, codebook)
    assert settled[:, 0].float().mean() > 0.9
    if abs(value) == torch.inf:  # an outlier costs nothing where the scale does not follow it
        assert settled[:, 1].float().mean() > 0.9
    if value != value:  # a NaN sends every query that meets it to the fallback
        assert not settled[:, 1].any()


def test_splits_and_rounds_change_nothing():
    x, codebook = gaussian(16, 3, 500, 20)
    codebook[1, 450, 3] = torch.nan  # met in the last round alone
    once, _ = run(x, codebook)
    assert_same_codes(once, x, codebook)
    for changes in (
        {"codes_per_split": 256, "splits": 2},
        {"codes_per_split": 128, "codes_per_round": 320, "splits": 3, "groups_per_round": 2},
        {"codes_per_split": 256, "codes_per_round": 256, "splits": 1, "groups_per_round": 1},
    ):
        indices, settled = run(x, codebook, slots=16, **changes)
        assert torch.equal(once, indices)
        assert settled[:, [0, 2]].float().mean() > 0.95 and not settled[:, 1].any()


def test_packed_rows():
    """What lies in the workspace: rounded numbers, zeros for padding, norms that mark what is no code."""
    d, num_codes = 20, 40
    x, codebook = gaussian(5, 1, num_codes, d)
    codebook[0, 7, 3], codebook[0, 9, 1] = torch.nan, 1e9
    codebook[0, 11] = 2.0**-20
    center, scale, unsettled = torch.zeros(1, d), torch.ones(1), torch.zeros(5, dtype=torch.int32)
    codes, queries = Packed.empty(1, 48, d, 3, x.device), Packed.empty(1, 16, d, 3, x.device)
    shape = {"D": d, "PADDED_D": 32, "PITCH": pitch(d), "ROWS": 16, "PARTS": 3}
    pack_codes[(3, 1)](
        codebook, *codebook.stride(), center, scale, codes.high, codes.low, codes.norm, 0, 0, num_codes, 48, **shape
    )
    x[2, 0, 1] = 1e4
    pack_queries[(1, 1)](
        x, 5, 0, d, d, 1, center, scale, queries.high, queries.low, queries.norm, queries.error, unsettled,
        0, 5, 1, 16, **shape,
    )  # fmt: skip
    far = 256 * FAR.value
    assert codes.norm[0, 7] == -far and codes.norm[0, 9] == far and (codes.norm[0, 40:] == far).all()
    for row in (7, 9, 11, *range(40, 48)):
        assert not codes.high[0, row].any() and not codes.low[0, row].any()
    assert not codes.high[..., d:].any() and not queries.high[..., d:].any()
    together = codes.high[0, :7, :d].float() + codes.low[0, :7, :d].float()
    torch.testing.assert_close(together, codebook[0, :7], rtol=2.0**-22, atol=2.0**-13)
    torch.testing.assert_close(codes.norm[0, :7], together.square().sum(-1))
    assert unsettled.tolist() == [0, 0, 1, 0, 0]
    assert queries.norm[0, 2] == -1 and (queries.norm[0, 5:] == -1).all() and not queries.high[0, 2].any()
    torch.testing.assert_close(queries.high[0, 0, :d].float(), -2 * x[0, 0], rtol=2.0**-10, atol=2.0**-13)
