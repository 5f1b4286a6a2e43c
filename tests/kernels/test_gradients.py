"""Gradients against float64, and their determinism."""

import pytest
import torch

from revq_kernels import nearest_code, quantize
from revq_kernels.testing.problems import segment_sum_truth

SHAPES = [(1, 1, 1, 1), (64, 2, 5, 4), (257, 3, 17, 8), (300, 1, 3, 31), (0, 2, 5, 4)]


@pytest.mark.parametrize(("n", "g", "k", "d"), SHAPES)
def test_codebook_gradient_is_the_segment_sum(n, g, k, d, impl):
    x, codebook = torch.randn(n, g, d), torch.randn(g, k, d, requires_grad=True)
    weight = torch.randn(n, g, d)
    quantized, indices = quantize(x, codebook, impl=impl)
    (quantized * weight).sum().backward()
    truth, budget = segment_sum_truth(weight, indices, k)
    assert codebook.grad.dtype == torch.float32
    assert bool(((codebook.grad.double() - truth).abs() <= budget).all())


@pytest.mark.parametrize(("dtype", "n"), [(torch.bfloat16, 600), (torch.float16, 3000)])
def test_gradient_has_the_codebooks_dtype_and_sums_in_float32(dtype, n, impl):
    x, codebook = torch.zeros(n, 1, 1, dtype=dtype), torch.zeros(1, 2, 1, dtype=dtype, requires_grad=True)
    quantize(x, codebook, impl=impl).quantized.sum().backward()
    assert codebook.grad.dtype == dtype
    # in the input's own precision a running sum of ones would stall at 256 (bfloat16) or 2048 (float16)
    assert codebook.grad[0, 0].item() == n


def test_x_gets_no_gradient_and_the_search_none(impl):
    x, codebook = torch.randn(5, 2, 4, requires_grad=True), torch.randn(2, 7, 4, requires_grad=True)
    assert not nearest_code(x, codebook, impl=impl).requires_grad
    quantize(x, codebook, impl=impl).quantized.sum().backward()
    assert x.grad is None


def test_no_graph_without_a_gradient_to_give(impl):
    x, codebook = torch.randn(5, 2, 4), torch.randn(2, 7, 4, requires_grad=True)
    assert not quantize(x, codebook.detach(), impl=impl).quantized.requires_grad
    with torch.no_grad():
        assert not quantize(x, codebook, impl=impl).quantized.requires_grad


def test_gradient_bits_do_not_depend_on_threads_and_implementation():
    x, codebook = torch.randn(5000, 1, 4), torch.randn(1, 9, 4, requires_grad=True)
    weight = torch.randn(5000, 1, 4)
    gradients = []
    before = torch.get_num_threads()
    for impl in ("reference", "native"):
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            codebook.grad = None
            (quantize(x, codebook, impl=impl).quantized * weight).sum().backward()
            gradients.append(codebook.grad.clone())
    torch.set_num_threads(before)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize("favorite", [0, 250, 499])
def test_gradient_bits_when_most_queries_select_one_code(favorite):
    """Codes are distributed over threads by their counts, but the order of each sum does not change."""
    indices, grad = torch.randint(0, 500, (9000, 1)), torch.randn(9000, 1, 5)
    indices[torch.rand(9000, 1) < 0.9] = favorite
    expected = torch.ops.revq.segment_sum.reference(grad, indices, 500)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(torch.ops.revq.segment_sum(grad, indices, 500), expected)
    finally:
        torch.set_num_threads(before)


def test_gradient_of_the_gradient(impl):
    """Second derivatives, as of a gradient penalty, equal those of plain indexing in float64."""
    x, codebook = torch.randn(6, 2, 3), torch.randn(2, 4, 3, requires_grad=True)
    quantized, indices = quantize(x, codebook, impl=impl)
    (gradient,) = torch.autograd.grad((quantized**3).sum(), codebook, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), codebook)
    truth = codebook.detach().double().requires_grad_()
    rows = truth[torch.arange(2), indices]
    (gradient,) = torch.autograd.grad((rows**3).sum(), truth, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), truth)
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=1e-5)


def test_results_can_be_changed_in_place(impl):
    codebook = torch.randn(2, 7, 4, requires_grad=True)
    quantize(torch.randn(5, 2, 4), codebook, impl=impl).quantized.mul_(3).sum().backward()
    assert codebook.grad.sum() == 3 * 5 * 2 * 4


def test_denormal_gradients_add_up_when_torch_flushes_them(impl):
    codebook = torch.zeros(1, 1, 1, requires_grad=True)
    quantized = quantize(torch.zeros(3, 1, 1), codebook, impl=impl).quantized
    torch.set_flush_denormal(True)
    try:
        quantized.backward(torch.full((3, 1, 1), 1e-39))
    finally:
        torch.set_flush_denormal(False)
    assert codebook.grad.item() == pytest.approx(3e-39, rel=1e-5)


def test_non_contiguous_gradient(impl):
    x, codebook = torch.randn(6, 2, 4), torch.randn(2, 7, 4, requires_grad=True)
    quantized, indices = quantize(x, codebook, impl=impl)
    weight = torch.randn(4, 2, 6)
    (quantized.permute(2, 1, 0) * weight).sum().backward()
    truth, budget = segment_sum_truth(weight.permute(2, 1, 0), indices, 7)
    assert bool(((codebook.grad.double() - truth).abs() <= budget).all())
    codebook.grad = None
    quantize(x, codebook, impl=impl).quantized.sum().backward()  # an expanded gradient
    assert codebook.grad.sum().item() == x.numel()
