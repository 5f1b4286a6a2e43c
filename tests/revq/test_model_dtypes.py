"""ReVQ and Tokenizer in other dtypes, under other default dtypes, from inference mode and from the meta device."""

import copy

import pytest
import torch
from test_model import SHAPE, latents, numpy_tokens, tiny_model
from tiny_vae import IMAGE_SIZE, LATENT_SHAPE, save_tiny_vae

from revq.config import ModelConfig, RectifierConfig
from revq.data.vae import load_vae
from revq.model.normalizer import Normalizer
from revq.model.revq import ReVQ
from revq.tokenizer import Tokenizer

KINDS = ("efficientvit", "cnn", "mlp", "identity")
DTYPES = (torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def config(kind="mlp"):
    return ModelConfig(SHAPE, 32, 12, rectifier=RectifierConfig(kind, 32, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_converted_model_searches_its_own_codes(kind, dtype):
    plain, batch = tiny_model(kind=kind).eval(), latents(5, seed=2)
    model = copy.deepcopy(plain).to(dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.quantizer.codebook.equal(plain.quantizer.codebook.to(dtype))
    assert model.normalizer.mean.equal(plain.normalizer.mean) and model.normalizer.std.equal(plain.normalizer.std)
    indices, quantized, loss = numpy_tokens(model, batch, "channel", 32)
    for given in (batch, batch.double()):
        assert torch.equal(model.encode_latents(given), torch.from_numpy(indices))
    out = model(batch)
    assert torch.equal(out.indices, torch.from_numpy(indices))
    assert out.quantizer_loss.item() == pytest.approx(loss, rel=1e-5)
    unrectified = model.decode_tokens(out.indices, rectify=False)
    torch.testing.assert_close(unrectified, torch.from_numpy(quantized).float(), atol=1e-4, rtol=0)
    assert torch.equal(model.decode_tokens(out.indices), out.latents)
    assert {tensor.dtype for tensor in (unrectified, out.latents, out.rectifier_loss, out.quantizer_loss)} == {
        torch.float32
    }
    with torch.no_grad():  # the rectifier of the converted weights, in float32: within the rounding of the dtype
        of_weights = copy.deepcopy(model).float()
        exact, scale = of_weights.decode_tokens(out.indices), of_weights.normalizer.std
    assert ((out.latents - exact) / scale).abs().max() < 64 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_converted_model_trains_and_saves(dtype, tmp_path):
    model = tiny_model(kind="mlp").to(dtype).train()
    out = model(latents(5), joint=True)
    (out.quantizer_loss + out.rectifier_loss).backward()
    assert model.quantizer.codebook.grad.dtype == dtype and model.quantizer.codebook.grad.abs().sum() > 0
    assert all(weight.grad is not None for weight in model.rectifier.parameters())
    assert model.quantizer.count.sum() == 5 * 32
    model.eval().save_pretrained(tmp_path / "model")
    loaded = ReVQ.from_pretrained(tmp_path / "model")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encode_latents(latents(5, 3)), model.encode_latents(latents(5, 3)))


def test_the_statistics_stay_float32():
    normalizer = Normalizer(SHAPE)
    normalizer.mean.fill_(1 + 2**-20)
    for convert in (Normalizer.half, Normalizer.double, lambda n: n.to("meta", torch.half).to_empty(device="cpu")):
        assert convert(normalizer).mean.dtype == torch.float32
    halves = {"mean": torch.ones(SHAPE, dtype=torch.float64), "std": torch.ones(SHAPE, dtype=torch.float64)}
    normalizer.load_state_dict(halves, assign=True)
    assert normalizer.normalize(torch.zeros(1, *SHAPE)).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_dtype_changes_nothing(kind, default_dtype, tmp_path):
    torch.manual_seed(3)
    model = ReVQ(config(kind)).eval()
    assert torch.get_default_dtype() == default_dtype
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    plain = ReVQ(config(kind)).eval()
    plain.save_pretrained(tmp_path / "model")
    batch = latents(5, seed=2)
    tokens, images = plain.encode_latents(batch), plain(batch).latents
    torch.set_default_dtype(default_dtype)
    for other in (model, ReVQ.from_pretrained(tmp_path / "model")):
        assert all(value.equal(other.state_dict()[name]) for name, value in plain.state_dict().items())
        assert {weight.dtype for weight in other.parameters()} == {torch.float32}
        assert torch.equal(other.encode_latents(batch), tokens) and torch.equal(other(batch).latents, images)


def test_the_default_dtype_changes_no_token_of_an_image(default_dtype, tmp_path):
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float32) * 2 - 1
    found = []
    for dtype in (torch.float32, default_dtype):
        torch.set_default_dtype(dtype)
        if not found:
            vae = load_vae(save_tiny_vae(tmp_path / "vae"))
            model = ReVQ(ModelConfig(LATENT_SHAPE, 32, 16, rectifier=RectifierConfig("efficientvit", 32, 1)))
            Tokenizer(model, vae, IMAGE_SIZE).save_pretrained(tmp_path / "model")
        tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
        found.append((tokenizer.encode(images), tokenizer.reconstruct(images)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_model_made_in_inference_mode_can_be_trained(tmp_path):
    tiny_model(kind="cnn").save_pretrained(tmp_path / "model")
    with torch.inference_mode():
        models = [ReVQ(config()), ReVQ.from_pretrained(tmp_path / "model")]
        tokens = [model.eval().encode_latents(latents(4)) for model in models]
    for model, before in zip(models, tokens, strict=True):
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())
        assert torch.equal(model.encode_latents(latents(4)), before)
        out = model.train()(latents(4))
        (out.quantizer_loss + out.rectifier_loss).backward()
        assert model.quantizer.codebook.grad.abs().sum() > 0
    with torch.inference_mode():
        converted = models[0].bfloat16().train()
        converted(latents(4))
    out = converted(latents(4))
    (out.quantizer_loss + out.rectifier_loss).backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())
    assert converted.eval().encode_latents(latents(4)).shape == (4, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_the_meta_device(kind):
    plain, batch = tiny_model(kind=kind).eval(), latents(5)
    for assign in (False, True):
        with torch.device("meta"):
            model = ReVQ(plain.config)
        assert model.device.type == "meta" and model(batch.to("meta")).indices.shape == (5, 32)
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict({name: value.clone() for name, value in plain.state_dict().items()}, assign=assign)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        model.eval()
        assert torch.equal(model.encode_latents(batch), plain.encode_latents(batch))
        assert torch.equal(model(batch).latents, plain(batch).latents)
        out = model.train()(batch)
        (out.quantizer_loss + out.rectifier_loss).backward()
        assert model.quantizer.count.sum() == 5 * 32
