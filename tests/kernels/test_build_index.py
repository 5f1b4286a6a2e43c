"""`FastChannelVQ.build_index`: results of the search over all codes, and what drops the tree."""

import copy
import pickle

import pytest
import torch

from revq_kernels import CodebookIndex, EMAUpdate, FastChannelVQ, MappedCodes, native, quantize

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"native: {native.load()}")
G, K, D = 2, 300, 4


def quantizer(**options) -> FastChannelVQ:
    return FastChannelVQ(K, D, num_groups=G, **options).eval()


@pytest.mark.parametrize("metric", ["l2", "cosine", "cosine_lookup"])
@pytest.mark.parametrize("shape", [(3, 7 * G, D), (1, G, D), (0, 2 * G, D), (2, 3 * D, 4, 2)])
def test_results_are_those_of_the_search_over_all_codes(metric, shape):
    vq = quantizer(metric=metric)
    with torch.no_grad():
        vq.codebook[:, 100:200] = vq.codebook[:, :100]  # ties: the lowest index
    x = torch.randn(shape)
    expected, encoded = vq(x), vq.encode(x)
    index = vq.build_index()
    assert isinstance(index, CodebookIndex) and vq.index is index and index.last.queries == 0
    found = vq(x)
    assert index.last.queries == expected.indices.numel(), "the tree was searched"
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(vq.encode(x), encoded)
    assert torch.equal(vq.decode(found.indices), vq.decode(expected.indices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_strides(dtype):
    vq = quantizer().to(dtype)
    x = torch.randn(D, 5 * G, 3).to(dtype).transpose(0, 2)
    expected = vq(x)
    vq.build_index()
    assert torch.equal(vq(x).indices, expected.indices) and torch.equal(vq(x).quantized, expected.quantized)


def test_masked_positions():
    vq, x = quantizer(layout="BLC", split="space"), torch.randn(3, 5 * G, D)
    mask = torch.rand(3, 5 * G) < 0.5
    expected = vq(x, mask=mask)
    vq.build_index()
    assert torch.equal(vq(x, mask=mask).indices, expected.indices)


def test_gradients_are_those_of_quantize():
    vq, x, weight = quantizer(estimator="none", commitment=0.0), torch.randn(40, G, D), torch.randn(40, G, D)
    vq.build_index()
    (ours,) = torch.autograd.grad((vq(x).quantized * weight).sum(), vq.codebook)
    codebook = vq.codebook.detach().requires_grad_()
    (theirs,) = torch.autograd.grad((quantize(x, codebook).quantized * weight).sum(), codebook)
    assert torch.equal(ours, theirs)


def test_codes_of_a_projector():
    vq = quantizer(codes=MappedCodes(torch.randn(G, K, 3), torch.nn.Linear(3, D)))
    x = torch.randn(2, 9 * G, D)
    expected = vq.encode(x)
    vq.build_index()
    assert torch.equal(vq.encode(x), expected)


def test_it_is_a_snapshot():
    """Nothing can detect a change in place by code outside torch, so the docstring says that the tree does not follow."""
    vq, x = quantizer(), torch.randn(2, 9 * G, D)
    before = vq.encode(x)
    vq.build_index()
    vq.codebook.data.mul_(-1)
    assert torch.equal(vq.encode(x), before)
    vq.build_index()
    assert not torch.equal(vq.encode(x), before)


DROPS = {
    "train": lambda vq, model: model.train(),
    "load_state_dict": lambda vq, model: model.load_state_dict(model.state_dict()),
    "to": lambda vq, model: model.to(torch.float64).to(torch.float32),
    "half": lambda vq, model: model.half(),
    "reset_": lambda vq, model: vq.reset_(noise=0.0),
    "initialize_": lambda vq, model: vq.initialize_(torch.randn(K, G, D)),
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=list(DROPS))
def test_what_drops_the_tree(drop):
    vq = quantizer()
    model = torch.nn.Sequential(vq).eval()
    vq.build_index()
    model.eval()
    assert vq.index is not None, "eval() keeps it"
    drop(vq, model)
    assert vq.index is None


def test_copies_and_pickles_are_without_the_tree():
    vq, x = quantizer(), torch.randn(2, 9 * G, D)
    vq.build_index()
    for other in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        assert other.index is None and torch.equal(other.encode(x), vq.encode(x))
    assert vq.index is not None and set(vq.state_dict()) == {"codebook", "count"}


def test_compiled_with_a_tree():
    vq, x = quantizer(), torch.randn(3, 9 * G, D)
    expected = vq.encode(x)
    vq.build_index()
    assert torch.equal(torch.compile(vq.encode, fullgraph=True, backend="aot_eager")(x), expected)


def test_errors():
    with pytest.raises(RuntimeError, match="build_index: expected eval mode"):
        FastChannelVQ(K, D).build_index()
    with pytest.raises(
        ValueError, match="metric: expected 'l2', 'cosine' or 'cosine_lookup' for a tree, got 'diagonal'"
    ):
        quantizer(metric="diagonal").build_index()
    with pytest.raises(
        ValueError, match=r"impl: expected 'auto' or 'native' for a tree, which is C.., got 'reference'"
    ):
        quantizer(impl="reference").build_index()
    with pytest.raises(ValueError, match="codebook: expected a CPU tensor, got one on meta"):
        quantizer().to("meta").build_index()
    vq = quantizer(update=EMAUpdate())
    vq.build_index()
    with pytest.raises(ValueError, match="x: expected"):
        vq(torch.randn(2, 3, D + 1))
