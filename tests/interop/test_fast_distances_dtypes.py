"""revq.fast_distances: dtypes, autocast, calls that run torch.cdist itself, and its errors."""

import pytest
import torch
from lazy_case import lazy, operands

import revq


@pytest.mark.parametrize("dtype_x", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype_c", [torch.float32, torch.bfloat16])
def test_autocast_gives_float32_as_cdist_does(dtype_x, dtype_c):
    x, c = operands(dtype=dtype_x)[0], operands(dtype=dtype_c)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = torch.cdist(x, c)
        with revq.fast_distances():
            d, e = torch.cdist(x, c), torch.cdist(x, c)
        assert d.is_lazy and d.dtype == full.dtype == torch.float32
        assert torch.equal(d.argmin(1), full.argmin(1))
        torch.testing.assert_close(d.min(1).values, full.min(1).values)
    torch.testing.assert_close(d.min(1).values, full.min(1).values)
    assert torch.equal(e.clone(), full)
    for a, b in zip(torch.autograd.grad(e.sum(), (x, c)), torch.autograd.grad(full.sum(), (x, c)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_operands_keep_their_dtype_and_find_the_nearest(dtype):
    x, c = operands(dtype=dtype)
    d = lazy(x, c)
    values, indices = d.min(1)
    truth = torch.cdist(x.double(), c.double())
    assert d.dtype == values.dtype == dtype and torch.equal(indices, truth.argmin(1))
    torch.testing.assert_close(values, truth.min(1).values.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # entered after torch.cdist, so it must not apply
        assert d.clone().dtype == dtype
    assert torch.equal(d.clone(), torch.cdist(x, c))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, c: torch.cdist(x.double(), c.double()),
        lambda x, c: torch.cdist(x, c, p=1),
        lambda x, c: torch.cdist(x, c, float("inf")),
        lambda x, c: torch.cdist(x[:0], c),
        lambda x, c: torch.func.vmap(torch.cdist, (0, None))(x[None], c),
        lambda x, c: torch.func.grad(lambda x: torch.cdist(x, c).min(1).values.sum())(x),
    ],
)
def test_what_is_left_to_cdist(call):
    x, c = operands()
    with revq.fast_distances():
        got = call(x, c)
    assert type(got) is torch.Tensor and torch.equal(got, call(x, c))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x, c: torch.cdist(x, c[:, :3]), RuntimeError),
        (lambda x, c: torch.cdist(x[0], c), RuntimeError),
        (lambda x, c: torch.cdist(x.expand(2, -1, -1), c.expand(3, -1, -1)), RuntimeError),
        (lambda x, c: torch.cdist(x, c, compute_mode="fast"), ValueError),
        (lambda x, c: torch.cdist(x, c, q=2), TypeError),
        (lambda x, c: torch.cdist(x, c).argmin(2), IndexError),
        (lambda x, c: torch.cdist(x, c).topk(91), RuntimeError),
    ],
)
def test_errors_are_cdists(call, error):
    x, c = operands()
    with pytest.raises(error) as expected:
        call(x, c)
    with pytest.raises(error) as got, revq.fast_distances():
        call(x, c)
    assert str(got.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_compute_mode_reaches_the_matrix():
    x, c = operands()
    for mode in ("use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
        assert torch.equal(lazy(x, c, compute_mode=mode) + 0, torch.cdist(x, c, compute_mode=mode))
