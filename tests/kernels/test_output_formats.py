"""Output formats: each tuple is what the other library's training code unpacks."""

import pytest
import torch

from revq_kernels import EMAUpdate, FastChannelVQ, QuantizerOutput
from revq_kernels.interop import formats

FORMATS = [formats.dac, formats.llamagen, formats.lucidrains, formats.taming, formats.titok, formats.transformers]


def outputs(output_format, training=True, shape=(2, 4, 3, 5), **options):
    """The format's result beside the default one, of equal modules."""
    vq, own = (FastChannelVQ(9, 4, split="space", output_format=f, **options) for f in (output_format, None))
    own.load_state_dict(vq.state_dict())
    x = torch.randn(shape)
    return vq.train(training)(x), own.train(training)(x), vq


def test_the_default_is_the_triple():
    assert isinstance(FastChannelVQ(4, 4)(torch.randn(1, 2, 4)), QuantizerOutput)


def test_taming_and_transformers():
    (quantized, loss, (perplexity, encodings, indices)), own, _ = outputs(formats.taming)
    assert torch.equal(quantized, own.quantized) and torch.equal(loss, own.loss) and perplexity is encodings is None
    assert torch.equal(indices, own.indices.reshape(-1))
    (quantized, loss, indices), own, _ = outputs(formats.transformers)
    assert torch.equal(quantized, own.quantized) and torch.equal(indices, own.indices.reshape(-1))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_swap_for_diffusers(legacy):
    """Values, losses and both gradients of the module as it comes from PyPI."""
    from diffusers.models.autoencoders.vae import VectorQuantizer

    theirs = VectorQuantizer(n_e=20, vq_embed_dim=4, beta=0.3, legacy=legacy)
    torch.nn.init.normal_(theirs.embedding.weight)
    ours = FastChannelVQ(20, 4, split="space", commitment=0.3, legacy_beta=legacy, output_format=formats.taming)
    ours.codebook.data[0] = theirs.embedding.weight.data
    data, weight, found = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), []
    for module, codes in ((theirs, theirs.embedding.weight), (ours, ours.codebook)):
        x = data.clone().requires_grad_()
        quantized, loss, (_, _, indices) = module(x)
        (loss + (quantized * weight).sum()).backward()
        found.append((quantized, loss, indices, x.grad, codes.grad.reshape(20, 4)))
    for of_theirs, of_ours in zip(*found, strict=True):
        torch.testing.assert_close(of_ours, of_theirs)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_swap_for_vector_quantize_pytorch(metric):
    """Three steps of averages and the rotation trick, where its package is installed (`pip install .[bench]`)."""
    package = pytest.importorskip("vector_quantize_pytorch")
    cosine = metric == "cosine"
    theirs = package.VectorQuantize(4, 16, decay=0.8, commitment_weight=1.0, rotation_trick=True, use_cosine_sim=cosine)
    update = EMAUpdate(decay=0.8)
    options = {"commitment": 1.0, "metric": metric, "estimator": "rotation", "output_format": formats.lucidrains}
    ours = FastChannelVQ(16, 4, update=update, **options)
    ours.codebook.copy_(theirs._codebook.embed)
    update.restart_(ours.codebook, torch.ones(1, 16).bool())
    for _ in range(3):
        data, weight, found = torch.randn(2, 50, 4), torch.randn(2, 50, 4), []
        for module in (theirs, ours):
            x = data.clone().requires_grad_()
            quantized, indices, loss = module(x)
            (loss.sum() + (quantized * weight).sum()).backward()
            found.append((quantized, indices, loss.reshape(()), x.grad))
        for of_theirs, of_ours in zip(*found, strict=True):
            torch.testing.assert_close(of_ours, of_theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.current_codes(), theirs._codebook.embed, rtol=1e-4, atol=1e-5)


def test_llamagen():
    (_, (codebook, commitment, entropy, usage), (_, _, indices)), own, vq = outputs(formats.llamagen)
    torch.testing.assert_close(codebook + commitment + entropy, own.loss)
    torch.testing.assert_close(commitment, 0.25 * codebook)
    assert entropy == 0 and usage == (vq.count > 0).float().mean() and indices.shape == (30,)
    (_, losses, _), _, _ = outputs(formats.llamagen, training=False)
    assert losses == (None, None, None, None)


@pytest.mark.parametrize("legacy", [False, True])
def test_titok(legacy):
    (_, result), own, _ = outputs(formats.titok, legacy_beta=legacy)
    assert set(result) == {"quantizer_loss", "commitment_loss", "codebook_loss", "min_encoding_indices"}
    torch.testing.assert_close(result["commitment_loss"] + result["codebook_loss"], result["quantizer_loss"])
    torch.testing.assert_close(
        result["commitment_loss"] / result["codebook_loss"], torch.tensor(4.0 if legacy else 0.25)
    )
    assert torch.equal(result["quantizer_loss"], own.loss)
    assert torch.equal(result["min_encoding_indices"], own.indices.reshape(2, 3, 5))


def test_lucidrains():
    (_, indices, loss), own, _ = outputs(formats.lucidrains)
    assert torch.equal(indices, own.indices.reshape(2, 3, 5)) and torch.equal(loss, own.loss)
    (_, indices, _), own, _ = outputs(formats.lucidrains, shape=(2, 7, 4))
    assert torch.equal(indices, own.indices)
    (_, indices, _), own, _ = outputs(formats.lucidrains, shape=(2, 7, 8), layout="BLC", num_groups=2)
    assert torch.equal(indices, own.indices.reshape(2, 7, 2))


def test_dac():
    vq = FastChannelVQ(9, 4, layout="BDT", split="space", output_format=formats.dac)
    x = torch.randn(2, 4, 5, requires_grad=True)
    quantized, commitment, codebook, indices, z_e = vq(x)
    assert z_e is x and indices.shape == (2, 5) and quantized.shape == x.shape
    difference = (quantized - x).detach().square().mean()
    torch.testing.assert_close(commitment, difference)
    (of_x,) = torch.autograd.grad(commitment, x)
    assert of_x.abs().sum() > 0
    (of_codes,) = torch.autograd.grad(codebook, vq.codebook)
    assert of_codes.abs().sum() > 0


def test_a_function_and_something_else():
    vq = FastChannelVQ(9, 4, output_format=lambda details, quantizer: details.indices)
    assert vq(torch.randn(2, 3, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"output_format: expected a function or None, got 'taming'"):
        FastChannelVQ(9, 4, output_format="taming")


@pytest.mark.parametrize("output_format", FORMATS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("commitment", [0.0, 0.25])
def test_every_format_without_a_term(output_format, commitment):
    vq = FastChannelVQ(9, 4, output_format=output_format, commitment=commitment)
    assert vq(torch.randn(2, 3, 4))[0] is not None
