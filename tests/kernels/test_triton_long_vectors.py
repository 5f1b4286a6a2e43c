"""The first pass over packed rows in Triton's interpreter: packing, search, fallback and rerank follow the contract.

`make test` runs this file in its own process, because TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import pytest
import torch
from torch import Tensor

from revq_kernels import triton
from revq_kernels.testing.problems import assert_same_codes

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own: `make test` does that", allow_module_level=True)

from revq_kernels.triton import launches
from revq_kernels.triton.addressing import grouped_rows
from revq_kernels.triton.first_pass_long import pack_codes, pack_queries
from revq_kernels.triton.first_pass_tensor_core import FAR
from revq_kernels.triton.launches import Packed
from revq_kernels.triton.plan import FirstPassConfig, LaneLayout, Target, make_plan, pitch

QUERIES, CODES, CELL_TILES = 16, 32, 2
DIMS = (17, 33, 64, 100, 256, 512)


def run(x: Tensor, codebook: Tensor, products: int = 1, **changes) -> tuple[Tensor, Tensor]:
    """(indices ``[..., G]``, certified bool ``[N, G]``); ``changes`` are fields of the `LongPlan`."""
    rows, (num_groups, num_codes, d) = grouped_rows(x).count, codebook.shape
    config = FirstPassConfig("tensor_core", QUERIES, CODES, LaneLayout(4, 1, 4, 2), CELL_TILES, 4, products, depth=128)
    plan = make_plan(rows, num_groups, num_codes, d, Target("interpreter", 1, "interpreter"), first_pass=config)
    long = plan.long._replace(**changes)
    plan = plan._replace(long=long, slots=long.slots)
    indices = torch.full((rows, num_groups), -7)
    (workspace,) = launches.search(x, codebook, indices, None, None, plan)
    return indices.view(x.shape[:-1]), workspace.certified(plan.slots).view(rows, num_groups)


def gaussian(n: int, g: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, g, d, generator=generator), torch.randn(g, k, d, generator=generator)


@pytest.mark.parametrize("products", [1, 3])
@pytest.mark.parametrize("d", DIMS)
def test_index_follows_the_contract(d, products):
    x, codebook = gaussian(21, 2, 203, d) if d <= 64 else gaussian(10, 1, 135, d)
    indices, certified = run(x, codebook, products)
    assert_same_codes(indices, x, codebook)
    assert certified.float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, codebook = gaussian(12, 2, 110, 40)
    for left, right in ((x.to(dtype), codebook.to(dtype)), (x, codebook.to(dtype)), (x.to(dtype), codebook)):
        indices, certified = run(left, right)
        assert_same_codes(indices, left, right)
        assert certified.float().mean() > 0.95


def test_any_strides():
    x, codebook = gaussian(40, 4, 180, 70)
    x, codebook = x[::2, ::2, 1::3], codebook[::2, ::2].transpose(1, 2).contiguous().transpose(1, 2)[..., 1::3]
    indices, _ = run(x, codebook)
    assert_same_codes(indices, x, codebook)


def test_duplicate_codes_do_not_need_the_fallback():
    x, codebook = gaussian(32, 1, 600, 33)
    codebook[:, 300:450] = codebook[:, torch.randperm(300)[:150]]
    mixed = codebook[:, torch.randperm(600)]
    indices, certified = run(x, mixed)
    assert_same_codes(indices, x, mixed)
    assert certified.all()


def test_equal_codes():
    x, _ = gaussian(20, 2, 1, 20)
    codebook = torch.ones(2, 300, 20)
    indices, certified = run(x, codebook)
    assert_same_codes(indices, x, codebook)
    assert not certified.any()


def test_a_mean_offset_does_not_need_the_fallback():
    x, codebook = gaussian(20, 1, 200, 48)
    indices, certified = run(x + 1e4, codebook + 1e4)
    assert_same_codes(indices, x + 1e4, codebook + 1e4)
    assert certified.float().mean() > 0.9


@pytest.mark.parametrize(
    ("value", "products"), [(torch.nan, 1), (torch.nan, 3), (torch.inf, 1), (-torch.inf, 3), (1e9, 3), (1e30, 1)]
)
def test_codes_and_queries_out_of_range(value, products):
    x, codebook = gaussian(16, 2, 150, 24)
    x[3, 1, 5] = value
    indices, certified = run(x, codebook, products)
    assert_same_codes(indices, x, codebook)
    assert not certified[3, 1] and certified.float().mean() > 0.9
    codebook[1, 140, 7] = value
    codebook[1, 145] = value
    indices, certified = run(x, codebook, products)
    assert_same_codes(indices, x, codebook)
    assert certified[:, 0].float().mean() > 0.9
    if abs(value) == torch.inf:  # an outlier needs no fallback if the scale does not depend on it
        assert certified[:, 1].float().mean() > 0.9
    if value != value:  # a NaN sends every query of its group to the fallback
        assert not certified[:, 1].any()


def test_splits_and_chunks_change_nothing():
    x, codebook = gaussian(16, 3, 500, 20)
    codebook[1, 450, 3] = torch.nan  # only the last chunk meets it
    once, _ = run(x, codebook)
    assert_same_codes(once, x, codebook)
    for changes in (
        {"codes_per_split": 256, "splits": 2},
        {"codes_per_split": 128, "codes_per_chunk": 320, "splits": 3, "groups_per_chunk": 2},
        {"codes_per_split": 256, "codes_per_chunk": 256, "splits": 1, "groups_per_chunk": 1},
    ):
        indices, certified = run(x, codebook, slots=16, **changes)
        assert torch.equal(once, indices)
        assert certified[:, [0, 2]].float().mean() > 0.95 and not certified[:, 1].any()


def test_packed_rows():
    """Rows hold rounded values padded with zeros; a norm of +-256 FAR marks outliers, padding and NaN."""
    d, num_codes = 20, 40
    x, codebook = gaussian(5, 1, num_codes, d)
    codebook[0, 7, 3], codebook[0, 9, 1] = torch.nan, 1e9
    codebook[0, 11] = 2.0**-20
    center, scale, uncertified = torch.zeros(1, d), torch.ones(1), torch.zeros(5, dtype=torch.int32)
    codes, queries = Packed.empty(1, 48, d, 3, x.device), Packed.empty(1, 16, d, 3, x.device)
    shape = {"D": d, "PADDED_D": 32, "PITCH": pitch(d), "ROWS": 16, "PRODUCTS": 3}
    pack_codes[(3, 1)](codebook, *codebook.stride(), center, scale, *codes.codes, 0, 0, num_codes, 48, **shape)
    x[2, 0, 1] = 1e4
    pack_queries[(1, 1)](x, 5, 0, d, d, 1, center, scale, *queries, uncertified, 0, 5, 1, 16, **shape)
    far = 256 * FAR.value
    assert codes.norm[0, 7] == -far and codes.norm[0, 9] == far and (codes.norm[0, 40:] == far).all()
    for row in (7, 9, 11, *range(40, 48)):
        assert not codes.high[0, row].any() and not codes.low[0, row].any()
    assert not codes.high[..., d:].any() and not queries.high[..., d:].any()
    together = codes.high[0, :7, :d].float() + codes.low[0, :7, :d].float()
    torch.testing.assert_close(together, codebook[0, :7], rtol=2.0**-22, atol=2.0**-13)
    torch.testing.assert_close(codes.norm[0, :7], together.square().sum(-1))
    assert uncertified.tolist() == [0, 0, 1, 0, 0]
    assert queries.norm[0, 2] == -1 and (queries.norm[0, 5:] == -1).all() and not queries.high[0, 2].any()
    torch.testing.assert_close(queries.high[0, 0, :d].float(), -2 * x[0, 0], rtol=2.0**-10, atol=2.0**-13)
