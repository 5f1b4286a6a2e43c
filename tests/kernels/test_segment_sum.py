"""`segment_sum`, `utilization` and `perplexity`: the public sums and statistics of indices."""

import math

import pytest
import torch

from revq_kernels import FastChannelVQ, count_codes_, explain, nearest_code, perplexity, segment_sum, utilization
from revq_kernels.nn.codebook_updates import code_means
from revq_kernels.testing.problems import segment_sum_truth

SHAPES = [((64,), 2, 16, 8), ((33,), 3, 7, 5), ((1,), 1, 1, 1), ((0,), 2, 4, 3), ((2, 3, 5), 4, 300, 4), ((), 2, 5, 4)]


@pytest.mark.parametrize(("leading", "g", "k", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_within_the_error_of_float32(leading, g, k, d, dtype, impl):
    values, indices = torch.randn(*leading, g, d).to(dtype), torch.randint(0, k, (*leading, g))
    total = segment_sum(values, indices, k, impl=impl)
    truth, budget = segment_sum_truth(values, indices, k)
    assert total.dtype == torch.float32 and total.shape == (g, k, d)
    assert bool(((total.double() - truth).abs() <= budget).all())


def test_strides_and_gradients_do_not_matter(impl):
    values = torch.randn(6, 4, 50, requires_grad=True).permute(2, 1, 0)
    indices = torch.randint(0, 9, (4, 50)).T
    total = segment_sum(values, indices, 9, impl=impl)
    assert torch.equal(total, segment_sum(values.detach().contiguous(), indices.contiguous(), 9, impl=impl))
    assert not total.requires_grad
    assert torch.equal(total, segment_sum(values, indices, 9, impl=impl, deterministic=False))


@pytest.mark.parametrize(
    ("values", "indices", "num_codes", "error", "message"),
    [
        (torch.zeros(3, 2, 4), torch.zeros(3, 3).long(), 5, ValueError, r"values: expected \[..., G, d\]"),
        (torch.zeros(4), torch.zeros(()).long(), 5, ValueError, "indices: expected"),
        (torch.zeros(3, 2, 4), torch.zeros(3, 2), 5, TypeError, "indices: expected dtype torch.int64"),
        (torch.zeros(3, 2, 4).double(), torch.zeros(3, 2).long(), 5, TypeError, "values: expected dtype float32"),
        (torch.zeros(3, 2, 4), torch.zeros(3, 2).long(), 0, ValueError, "num_codes: expected 1 <= K"),
        (
            torch.zeros(3, 2, 4),
            torch.zeros(3, 2).long().to("meta"),
            5,
            ValueError,
            "indices: expected the device of values",
        ),
        (None, torch.zeros(3, 2).long(), 5, TypeError, "values: expected a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_arguments(values, indices, num_codes, error, message):
    with pytest.raises(error, match=message):
        segment_sum(values, indices, num_codes)


def test_an_index_out_of_range(impl):
    for wrong in (-1, 5):
        with pytest.raises((ValueError, RuntimeError), match=r"indices: expected values in \[0, K=5\), got"):
            segment_sum(torch.zeros(3, 2, 4), torch.full((3, 2), wrong), 5, impl=impl)


def test_means_and_counts():
    vectors, indices = torch.randn(40, 2, 3), torch.randint(0, 6, (40, 2))
    indices[indices == 4] = 3
    mean, count = code_means(vectors, indices, 6)
    for g in range(2):
        for k in range(6):
            members = vectors[indices[:, g] == k, g].double()
            assert count[g, k] == len(members)
            expected = members.mean(dim=0) if len(members) else torch.zeros(3).double()
            torch.testing.assert_close(mean[g, k].double(), expected)


def test_statistics_of_counts():
    count = torch.tensor([[1, 1, 1, 1], [8, 0, 0, 0], [0, 0, 0, 0], [3, 1, 0, 0]])
    assert utilization(count).tolist() == [1.0, 0.25, 0.0, 0.5]
    found = perplexity(count)
    assert found.dtype == torch.float32 and found[0] == 4 and found[1] == 1 and math.isnan(found[2])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(found[3]) == pytest.approx(math.exp(entropy))
    vq = FastChannelVQ(4, 2, num_groups=4)
    count_codes_(vq.count, torch.tensor([[0, 1, 2, 3], [1, 1, 0, 0]]))
    assert torch.equal(vq.perplexity, perplexity(vq.count)) and torch.equal(vq.utilization, utilization(vq.count))
    for function in (utilization, perplexity):
        with pytest.raises(TypeError, match=r"count: expected dtype torch\.int64"):
            function(count.float())
        with pytest.raises(ValueError, match=r"count: expected \[G, K\]"):
            function(count[0])


def test_the_quantizer_runs_the_implementation_it_is_given(impl):
    vq = FastChannelVQ(12, 4, impl=impl)
    x = torch.randn(2, 6, 4, requires_grad=True)
    out = vq(x)
    assert torch.equal(out.indices, nearest_code(x.reshape(-1, 1, 4), vq.codebook, impl=impl).reshape(2, 6))
    assert explain(x.reshape(-1, 1, 4), vq.codebook, impl=impl).implementation == impl
    out.loss.backward()
    assert torch.equal(vq.encode(x), out.indices) and vq.codebook.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"impl: expected one of \('auto'"):
        FastChannelVQ(4, 4, impl="cuda")
    with pytest.raises(ValueError, match="impl: metric='diagonal' has no kernel"):
        FastChannelVQ(4, 4, metric="diagonal", impl="native")
