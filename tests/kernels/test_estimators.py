"""Estimators: the value is the code's, bit for bit; the gradient is the formula's."""

import pytest
import torch

from revq_kernels import FastChannelVQ
from revq_kernels.nn.losses import estimate


def dense_rotation(x, q):
    """lambda R in float64, by the paper's matrix."""
    e, f = x / x.norm(), q / q.norm()
    r = (e + f) / (e + f).norm()
    rotation = torch.eye(len(x), dtype=x.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(f, e)
    return q.norm() / x.norm() * rotation


@pytest.mark.parametrize("d", [2, 3, 8, 64])
def test_rotation_is_the_dense_matrix(d):
    x, q, grad = torch.randn(5, d, requires_grad=True), torch.randn(5, d), torch.randn(5, d)
    out = estimate("rotation", x, q)
    out.backward(grad)
    assert torch.equal(out, q)
    for row in range(5):
        matrix = dense_rotation(x[row].detach().double(), q[row].double())
        torch.testing.assert_close(matrix @ x[row].detach().double(), q[row].double(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(x.grad[row].double(), matrix.T @ grad[row].double(), rtol=1e-4, atol=1e-5)


def test_vectors_without_a_direction():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-2.0, -4.0], [0.0, 0.0]])
    estimate("rotation", x, q).backward(torch.ones(4, 2))
    assert x.grad[0].tolist() == [1, 1] and x.grad[3].tolist() == [1, 1], "as the straight-through estimator"
    assert x.grad[1].tolist() == [0, 0], "a code of length 0"
    assert x.grad[2].isfinite().all() and x.grad[2].norm().item() == pytest.approx(2 * 2**0.5), "opposite: a reflection"


def test_rotation_is_a_constant_to_a_second_gradient():
    x, q = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (first,) = torch.autograd.grad(estimate("rotation", x, q).square().sum(), x, create_graph=True)
    assert first.requires_grad, "the gradient depends on x through the value"
    (second,) = torch.autograd.grad(first.sum(), x)
    for row in range(3):
        matrix = dense_rotation(x[row].detach().double(), q[row].double())
        torch.testing.assert_close(
            second[row].double(), 2 * matrix.T @ matrix @ torch.ones(4).double(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "none"])
def test_the_module(estimator):
    vq = FastChannelVQ(9, 4, estimator=estimator, commitment=0.0)
    x = torch.randn(2, 5, 4, requires_grad=True)
    out = vq(x)
    assert torch.equal(out.quantized, vq.decode(out.indices))
    out.quantized.sum().backward()
    if estimator == "none":
        assert x.grad is None and vq.codebook.grad.sum() == 40
    else:
        assert vq.codebook.grad is None
        assert torch.equal(x.grad, torch.ones_like(x)) == (estimator == "straight_through")


def test_unknown():
    with pytest.raises(ValueError, match=r"estimator: expected 'straight_through', 'rotation' or 'none', got 'gumbel'"):
        FastChannelVQ(4, 4, estimator="gumbel")
