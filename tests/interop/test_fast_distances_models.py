"""revq.fast_distances on unmodified packages: diffusers' VectorQuantizer and transformers' Mimi."""

import pytest
import torch
from torch import Tensor

import revq
from revq_kernels import nearest_code


def wrong_codes(x: Tensor, codebook: Tensor, got: Tensor, other: Tensor) -> int:
    """How often ``other`` differs from ``got``; in float64, no differing code of ``other`` may be nearer."""
    exact = torch.cdist(x.double(), codebook.double())
    differs = got != other
    ours, theirs = (exact.gather(1, i[:, None])[differs, 0] for i in (got, other))
    assert (ours <= theirs * (1 + 1e-6)).all()
    return int(differs.sum())


def quantizer(spread: float, **kwargs):
    diffusers = pytest.importorskip("diffusers.models.autoencoders.vae")
    module = diffusers.VectorQuantizer(1024, 8, beta=0.25, **kwargs)
    with torch.no_grad():
        module.embedding.weight.normal_(std=spread)
    return module


def outputs(module, z):
    z = z.clone().requires_grad_()
    module.zero_grad()
    quantized, loss, (_, _, indices) = module(z)
    (loss + (quantized * torch.linspace(-1, 1, quantized.numel()).view_as(quantized)).sum()).backward()
    return quantized, loss, indices, z.grad, module.embedding.weight.grad


@pytest.mark.parametrize("legacy", [True, False])
def test_diffusers_with_gradients(legacy):
    module, z = quantizer(1.0, legacy=legacy, sane_index_shape=legacy), torch.randn(2, 8, 16, 16)
    expected = outputs(module, z)
    with revq.fast_distances():
        got = outputs(module, z)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_diffusers_without(context):
    module, z = quantizer(1.0), torch.randn(2, 8, 16, 16)
    with context():
        expected = module(z)
        with revq.fast_distances():
            got = module(z)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(got[2][2], expected[2][2])


def test_diffusers_where_the_original_is_wrong():
    module, z = (
        quantizer(1e-3),
        10 * torch.randn(2, 8, 16, 16),
    )  # about as small as the codes that diffusers initializes
    expected = outputs(module, z)
    with revq.fast_distances():
        got = outputs(module, z)
    rows, codebook = z.permute(0, 2, 3, 1).reshape(-1, 8), module.embedding.weight.detach()
    assert wrong_codes(rows, codebook, got[2], expected[2]) > 0
    assert torch.equal(got[2], nearest_code(rows[:, None], codebook[None])[:, 0])


def test_diffusers_under_autocast_and_compile():
    module, z = quantizer(1.0), torch.randn(2, 8, 16, 16)
    with torch.no_grad(), revq.fast_distances():
        expected = module(z)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(z)[2][2], expected[2][2])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(z)[2][2], expected[2][2])


@pytest.fixture
def mimi():
    pytest.importorskip("transformers")
    from transformers import MimiConfig
    from transformers.models.mimi.modeling_mimi import MimiSplitResidualVectorQuantizer

    config = MimiConfig(
        hidden_size=24, codebook_size=128, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=4
    )
    module = MimiSplitResidualVectorQuantizer(config)
    for name, buffer in module.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    return module


class Spy(torch.overrides.TorchFunctionMode):
    """Counts the matrices that torch.cdist computes: entered before the block, it sees the calls that the block passes on."""

    built = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.built += func is torch.cdist
        return func(*args, **(kwargs or {}))


def test_mimi(mimi):
    embeddings = torch.randn(2, 24, 50)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), Spy() as spy:
            expected = mimi.encode(embeddings)
            assert spy.built == 4
            with revq.fast_distances():
                got = mimi.encode(embeddings)
            assert spy.built == 4, "a matrix was built"
        assert torch.equal(got, expected)
        assert torch.equal(mimi.decode(got.transpose(0, 1)), mimi.decode(expected.transpose(0, 1)))


def test_mimi_gradients(mimi):
    found = []
    for fast in (False, True):
        embeddings = torch.linspace(-2, 2, 24 * 50).view(1, 24, 50).sin().requires_grad_()
        if fast:
            with revq.fast_distances():
                codes = mimi.encode(embeddings)
        else:
            codes = mimi.encode(embeddings)
        mimi.zero_grad()
        mimi.decode(codes.transpose(0, 1)).square().mean().backward()
        found.append([p.grad.clone() for p in mimi.parameters() if p.grad is not None])
    assert found[0]
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected)
