"""The entropies that are computed in blocks, against the dense formula in float64."""

import pytest
import torch
from drop_in_case import largest_tensor

from revq_kernels.interop.families import autoregressive
from revq_kernels.interop.families.autoregressive import code_entropies
from revq_kernels.interop.families.family import Call

EPS = 1e-5


def dense(x, codes, temperature):
    p = torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist").square().div(-temperature).softmax(1)
    mean = p.mean(0)
    return -torch.special.xlogy(p, p).sum(1).mean(), -(mean * (mean + EPS).log()).sum()


def both(function, x, codes, temperature, weights=(1.0, -1.0)):
    x, codes = x.clone().requires_grad_(), codes.clone().requires_grad_()
    values = function(x, codes, temperature)
    gradients = torch.autograd.grad(sum(w * v for w, v in zip(weights, values, strict=True)), (x, codes))
    return [value.detach() for value in values], gradients


def ours(x, codes, temperature):
    return code_entropies(x, codes, temperature, EPS)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(autoregressive, "_CPU_PAIRS", 37 * 5)  # blocks of five rows, and a smaller last block


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, -2.0)])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_values_and_gradients(temperature, weights):
    x, codes = torch.randn(23, 6, dtype=torch.float64) / 3, torch.randn(37, 6, dtype=torch.float64) / 3
    values, gradients = both(ours, x, codes, temperature, weights)
    expected, slopes = both(dense, x, codes, temperature, weights)
    torch.testing.assert_close(values, list(expected), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, slopes, rtol=1e-9, atol=1e-11)

    values, gradients = both(ours, x.float(), codes.float(), temperature, weights)
    torch.testing.assert_close(values, [value.float() for value in expected], rtol=1e-4, atol=1e-4)
    for found, right in zip(gradients, slopes, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, right.float(), rtol=1e-3, atol=1e-4 * float(right.abs().max()))


def test_gradcheck():
    x, codes = (torch.randn(n, 3, dtype=torch.float64).mul_(0.2).requires_grad_() for n in (7, 37))
    assert torch.autograd.gradcheck(lambda x, codes: ours(x, codes, 0.1), (x, codes))


def test_autocast_and_narrow_inputs():
    x, codes = torch.randn(23, 6).bfloat16(), torch.randn(37, 6)
    values, gradients = both(ours, x.float(), codes, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, slopes = both(ours, x, codes, 0.5)
    assert all(map(torch.equal, values, narrow)) and narrow[0].dtype == torch.float32
    assert slopes[0].dtype == torch.bfloat16
    assert torch.equal(slopes[0], gradients[0].bfloat16()) and torch.equal(slopes[1], gradients[1])


def test_compiles_as_one_graph():
    x, codes = torch.randn(23, 6), torch.randn(37, 6)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for found, expected in zip(both(compiled, x, codes, 0.5), both(ours, x, codes, 0.5), strict=True):
        torch.testing.assert_close(list(found), list(expected))


def test_no_matrix():
    class Entropies(torch.nn.Module):
        forward = staticmethod(ours)

    assert largest_tensor(Entropies(), Call("forward", (torch.randn(200, 6), torch.randn(37, 6), 0.1))) <= 200 * 6
