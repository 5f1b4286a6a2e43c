"""revq.fast_distances: the answers of the fused search, their gradients and their indices."""

import pytest
import torch
from lazy_case import LargestResult, lazy, operands

import revq
from revq_kernels import nearest_code

QUESTIONS = {
    "argmin": lambda d, dim: (d.argmin(dim),),
    "argmin-keepdim": lambda d, dim: (torch.argmin(d, dim=dim, keepdim=True),),
    "argmin-keywords": lambda d, dim: (torch.argmin(input=d, dim=dim),),
    "min": lambda d, dim: d.min(dim),
    "min-function": lambda d, dim: torch.min(d, dim, keepdim=True),
    "topk": lambda d, dim: d.topk(1, dim=dim, largest=False),
    "topk-function": lambda d, dim: torch.topk(d, 1, dim, False, sorted=False),
    "negative-argmax": lambda d, dim: ((-d).argmax(dim=dim),),
    "negative-max": lambda d, dim: torch.max(d.neg(), dim),
    "negative-topk": lambda d, dim: (-d).topk(1, dim),
    "twice-negative": lambda d, dim: d.neg().neg().min(dim),
}


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_are_those_of_cdist(name, dim):
    x, c = operands()
    full, d = torch.cdist(x, c), lazy(x, c)
    expected, got = QUESTIONS[name](full, dim), QUESTIONS[name](d, dim)
    assert d.is_lazy
    assert type(got) is type(expected)
    assert torch.equal(got[-1], expected[-1]) and not got[-1].requires_grad
    if len(got) == 2:
        torch.testing.assert_close(got[0], expected[0])
        weight = torch.randn_like(got[0])
        for a, b in zip(
            torch.autograd.grad((got[0] * weight).sum(), (x, c)),
            torch.autograd.grad((expected[0] * weight).sum(), (x, c)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape_x", "shape_c"),
    [
        ((1, 40, 5), (1, 30, 5)),
        ((3, 40, 5), (3, 30, 5)),
        ((3, 40, 5), (30, 5)),
        ((40, 5), (3, 30, 5)),
        ((3, 1, 40, 5), (2, 30, 5)),
        ((2, 1, 4, 40, 5), (1, 3, 1, 30, 5)),
        ((1, 3, 40, 5), (2, 1, 30, 5)),
    ],
)
def test_batches_broadcast(shape_x, shape_c):
    x, c = operands(shape_x, shape_c)
    full = torch.cdist(x, c)
    for dim in (-1, -2, full.dim() - 1):
        d = lazy(x, c)
        got, expected = d.min(dim), full.min(dim)
        assert d.is_lazy and torch.equal(got.indices, expected.indices) and got.indices.is_contiguous()
        torch.testing.assert_close(got.values, expected.values)
        for a, b in zip(
            torch.autograd.grad(got.values.square().sum(), (x, c)),
            torch.autograd.grad(expected.values.square().sum(), (x, c), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    d = lazy(x, c)
    d.argmin(0)  # over a batch dim if there are more than two dims
    assert d.is_lazy == (full.dim() == 2)


def test_expanded_operands_are_searched_once():
    x, c = operands((4, 40, 5), (30, 5))
    codes = c[None].expand(4, -1, -1)
    d = lazy(x, codes)
    assert torch.equal(d.argmin(-1), torch.cdist(x, codes).argmin(-1))
    with LargestResult() as spy, torch.no_grad():
        lazy(x[:1].detach().expand(4000, -1, -1), c[None].detach().expand(4000, -1, -1)).argmin(-1)
    assert spy.nbytes <= 8 * 4000 * 40, "more than the indices"
    for a, b in zip(
        torch.autograd.grad(d.min(-1).values.sum(), (x, codes)),
        torch.autograd.grad(torch.cdist(x, codes).min(-1).values.sum(), (x, codes)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", [lambda d: d[0], lambda d: d[-1], lambda d: d.squeeze(0), lambda d: d.select(0, 0)])
def test_a_row_of_the_batch_stays_lazy_and_stays_a_view(row):
    x, c = operands((1, 40, 5), (1, 30, 5))
    full = torch.cdist(x, c)
    d = lazy(x, c)
    assert torch.equal(row(d).argmin(-1), row(full).argmin(-1)) and d.is_lazy
    part = row(d)
    d.detach().zero_()
    assert not part.is_lazy and part.sum() == 0
    other = lazy(x, c)
    part = row(other)
    part.detach()[3] = -1
    assert torch.equal(other[0, 3], torch.full((30,), -1.0))


def test_the_matrix_is_never_built():
    x, c = torch.randn(16384, 4), torch.randn(100_000, 4)  # the matrix would take 6.6 GB
    with LargestResult() as spy, revq.fast_distances():
        values, indices = torch.cdist(x, c).min(dim=1)
    assert spy.nbytes <= c.nbytes
    assert torch.equal(indices, nearest_code(x[:, None], c[None])[:, 0])
    torch.testing.assert_close(values, (x - c[indices]).norm(dim=1))


def test_the_tie_rule_is_the_contracts():
    x, c = torch.zeros(3, 2), torch.ones(50, 2)
    assert lazy(x, c).argmin(1).tolist() == [0, 0, 0]
    c[[7, 20], 0] = float("nan")
    values, indices = lazy(x, c).min(1)
    assert indices.tolist() == [7, 7, 7] and values.isnan().all()
    x, c = torch.randn(500, 4) + 1000, torch.randn(2000, 4) + 1000  # the matrix suffers from cancellation here
    truth = torch.cdist(x.double(), c.double())
    ours, theirs = (truth.gather(1, i[:, None]).sum() for i in (lazy(x, c).argmin(1), torch.cdist(x, c).argmin(1)))
    assert ours <= truth.min(1).values.sum() * (1 + 1e-6) < theirs


def test_gradient_is_zero_at_distance_zero():
    x = torch.randn(30, 4, requires_grad=True)
    grad = torch.autograd.grad(lazy(x, x.detach()).min(1).values.sum(), x)[0]
    assert torch.equal(grad, torch.zeros_like(grad))
