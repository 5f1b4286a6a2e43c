"""Metrics: the index of each is the contract's, and `FastChannelVQ` returns the codes that its metric searched."""

import pytest
import torch
import torch.nn.functional as F

from revq_kernels import FastChannelVQ, explain, nearest_code, reference
from revq_kernels.testing.problems import contract_index, problems

PROBLEMS = {problem.name: problem for problem in problems()}


def weight_of(x, metric):
    """Some of them zero or negative."""
    if metric != "diagonal":
        return None
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) + 1
    return weight.where(weight.abs() > 0.3, 0.0).to(x.dtype)


@pytest.mark.parametrize("metric", ["inner_product", "diagonal"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_index_is_the_contracts(name, metric):
    _, x, codebook = PROBLEMS[name]
    weight = weight_of(x, metric)
    expected = contract_index(x, codebook, metric=metric, weight=weight)
    assert torch.equal(nearest_code(x, codebook, metric=metric, weight=weight), expected)


@pytest.mark.parametrize("metric", ["inner_product", "diagonal"])
def test_chunks_of_codes_and_rows(metric, monkeypatch):
    monkeypatch.setattr(reference, "PAIRS_PER_CHUNK", 64)
    x, codebook = torch.randn(9, 2, 512), torch.randn(2, 150, 512)
    weight = weight_of(x, metric)
    expected = contract_index(x, codebook, metric=metric, weight=weight)
    assert torch.equal(nearest_code(x, codebook, metric=metric, weight=weight), expected)


def test_zeros_of_either_sign_are_equal():
    x, codebook = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-0.0, -0.0], [0.0, 0.0], [-0.0, 1.0]]])
    assert nearest_code(x, codebook, metric="inner_product").item() == 0
    assert nearest_code(-x, codebook, metric="inner_product").item() == 0


def test_explain_names_the_metric():
    x, codebook = torch.zeros(2, 1, 4), torch.zeros(1, 3, 4)
    for metric in ("inner_product", "diagonal"):
        choice = explain(x, codebook, metric=metric)
        assert choice.implementation == "reference" and f"no kernels for metric '{metric}'" in choice.reason
    assert explain(x, codebook, metric="cosine") == explain(x, codebook)
    with pytest.raises(ValueError, match=r"metric: expected one of .* got 'l1'"):
        explain(x, codebook, metric="l1")


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_an_implementation_requested_by_name_does_not_fall_back(impl):
    x, codebook = torch.zeros(2, 1, 4), torch.zeros(1, 3, 4)
    for call in (nearest_code, explain):
        with pytest.raises(ValueError, match=rf"impl: metric='inner_product' has no kernel.* got '{impl}'"):
            call(x, codebook, metric="inner_product", impl=impl)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosine"}, r"metric: expected one of \('l2', 'inner_product', 'diagonal'\), got 'cosine'"),
        ({"metric": "diagonal"}, r"weight: expected a tensor of x's shape for metric='diagonal', got None"),
        ({"weight": torch.ones(2, 1, 4)}, r"weight: expected None for metric='l2', got one"),
        (
            {"metric": "diagonal", "weight": torch.ones(2, 1, 3)},
            r"weight: expected x's shape \(2, 1, 4\), got \(2, 1, 3\)",
        ),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        nearest_code(torch.zeros(2, 1, 4), torch.zeros(1, 3, 4), **options)


def rows(tensor, d=8):
    return tensor.reshape(-1, 1, d)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("metric", ["l2", "cosine", "cosine_lookup", "inner_product", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_by_each_metric(metric, training, dtype):
    vq = FastChannelVQ(40, 8, metric=metric).train(training)
    x = (torch.randn(3, 20, 8) * 3).to(dtype)
    weight = torch.rand(3, 20, 8).to(dtype) if metric == "diagonal" else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(x, weight=weight)
    queries, codes = rows(x), vq.codebook.detach()
    if metric.startswith("cosine"):
        queries, codes = F.normalize(queries.float(), dim=-1), F.normalize(codes, dim=-1)
    if metric in ("inner_product", "diagonal"):
        expected = contract_index(queries, codes, metric=metric, weight=None if weight is None else rows(weight))
    else:
        expected = contract_index(queries, codes)
    expected = expected.reshape(3, 20)
    assert torch.equal(out.indices, expected) and torch.equal(vq.encode(x, weight=weight), expected)
    shown = codes if metric == "cosine" else vq.codebook.detach()
    assert torch.equal(out.quantized, shown[0, expected].to(dtype)) and out.quantized.dtype == dtype
    assert torch.equal(vq.decode(out.indices), shown[0, expected])
    assert vq.count.sum() == (60 if training else 0)
    inputs = queries.reshape(x.shape) if metric == "cosine" else x
    chosen = shown[0, expected].to(inputs.dtype)
    truth = 1.25 * (chosen.double() - inputs.double()).square().mean()
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "cosine_lookup"])
def test_gradients_pass_the_normalization(metric):
    vq = FastChannelVQ(7, 3, metric=metric)
    x, weight = torch.randn(2, 9, 3, requires_grad=True), torch.randn(2, 9, 3)
    out = vq(x)
    (out.loss + (out.quantized * weight).sum()).backward()
    truth_x, codebook = x.detach().double().requires_grad_(), vq.codebook.detach().double().requires_grad_()
    inputs, codes = truth_x, codebook
    if metric == "cosine":
        inputs, codes = F.normalize(truth_x, dim=-1), F.normalize(codebook, dim=-1)
    chosen = codes[0, out.indices]
    loss = F.mse_loss(chosen, inputs.detach()) + 0.25 * F.mse_loss(inputs, chosen.detach())
    (loss + ((inputs + (chosen - inputs).detach()) * weight.double()).sum()).backward()
    torch.testing.assert_close(x.grad.double(), truth_x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vq.codebook.grad.double(), codebook.grad, rtol=1e-5, atol=1e-6)


def test_a_zero_vector_has_a_code_and_a_finite_gradient():
    vq, x = FastChannelVQ(5, 4, metric="cosine"), torch.zeros(1, 3, 4, requires_grad=True)
    out = vq(x)
    (out.loss + out.quantized.sum()).backward()
    assert x.grad.isfinite().all() and out.quantized.isfinite().all()


def test_a_weight_for_another_metric_is_an_error():
    for vq in (FastChannelVQ(5, 4), FastChannelVQ(5, 4).eval(), FastChannelVQ(5, 4, metric="cosine")):
        with pytest.raises(ValueError, match=r"weight: expected None for metric="):
            vq(torch.zeros(1, 3, 4), weight=torch.ones(1, 3, 4))
