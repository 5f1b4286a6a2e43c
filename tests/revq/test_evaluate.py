"""The measures against counts and errors that the test computes itself."""

import math

import pytest
import torch
from pipeline_case import random_store, tiny_run
from tiny_vae import IMAGE_SIZE, save_photos, save_tiny_vae

from revq.config import ModelConfig, RectifierConfig
from revq.eval.evaluate import LatentErrors, code_use, image_quality, latent_errors, reconstruct, summarize_count
from revq.model.revq import ReVQ


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return random_store(tmp_path_factory.mktemp("evaluate") / "latents", rows=50)


def model_of(groups=None):
    run = tiny_run(codes=24)
    config = ModelConfig(run.model.latent_shape, 16, 24, groups, rectifier=RectifierConfig("mlp", 16, 1))
    return ReVQ(config)


@pytest.mark.parametrize("groups", [None, 4, 1])
def test_code_use(store, groups):
    model = model_of(groups)
    G = groups or 16
    latents = store.rows(range(50))
    tokens = latents.reshape(50, 16, 4)
    counts = [[0] * 24 for _ in range(G)]
    for sample in tokens:
        for token, vector in enumerate(sample):
            distances = (model.quantizer.codebook[token % G] - vector).square().sum(-1)
            counts[token % G][int(distances.argmin())] += 1
    used = [sum(count > 0 for count in book) / 24 for book in counts]
    entropy = [-sum(c / sum(book) * math.log(c / sum(book)) for c in book if c) for book in counts]
    before = model.quantizer.count.clone()
    use = code_use(model, store, batch_size=7)
    assert use.utilization == pytest.approx(sum(used) / G)
    assert use.lowest_utilization == pytest.approx(min(used))
    assert use.perplexity == pytest.approx(sum(map(math.exp, entropy)) / G)
    assert torch.equal(model.quantizer.count, before)


def test_summarize_count():
    even = summarize_count(torch.tensor([[5, 5, 5, 5], [7, 7, 0, 0]]))
    assert even == pytest.approx((0.75, 0.5, 3.0))
    assert summarize_count(torch.zeros(2, 3, dtype=torch.int64)).utilization == 0


def test_latent_errors(store):
    model = model_of().train()
    latents = store.rows(range(50))
    indices = model.encode_latents(latents)
    quantized = model.decode_tokens(indices, rectify=False)
    rectified = model.decode_tokens(indices)
    errors = latent_errors(model, store, batch_size=16)  # the last batch is smaller
    assert errors.quantized == pytest.approx(float((quantized - latents).square().mean()), rel=1e-4)
    assert errors.rectified == pytest.approx(float((rectified - latents).square().mean()), rel=1e-4)
    assert model.training and int(model.quantizer.count.sum()) == 0
    assert LatentErrors(0.5, 0.4).gain == pytest.approx(0.2)


def test_reconstructions_and_quality(tmp_path):
    from revq.data.images import center_crop, load_image, to_tensor
    from revq.data.vae import load_vae

    vae = load_vae(save_tiny_vae(tmp_path / "vae"))
    paths = save_photos(tmp_path / "photos", 5)
    images = to_tensor([center_crop(load_image(path), IMAGE_SIZE) for path in paths])
    model = ReVQ(ModelConfig(vae.latent_shape(IMAGE_SIZE), 16, 8, rectifier=RectifierConfig("mlp", 16, 1))).eval()
    pictures = reconstruct(model, vae, images, batch_size=2)
    indices = model.encode_latents(vae.encode(images))
    expected = (
        images,
        vae.decode(vae.encode(images)),
        vae.decode(model.decode_tokens(indices, rectify=False)),
        vae.decode(model.decode_tokens(indices)),
    )
    for picture, truth in zip(pictures, expected, strict=True):
        torch.testing.assert_close(picture, truth, rtol=1e-3, atol=1e-3)
    quality = image_quality(pictures)
    assert list(quality) == ["vae", "quantized", "rectified"]
    for name, picture in zip(quality, pictures[1:], strict=True):
        mse = ((picture - images) / 2).square().mean(dim=(1, 2, 3))
        assert quality[name].psnr == pytest.approx(float((-10 * mse.log10()).mean()), abs=1e-3)
        assert -1 <= quality[name].ssim < 1
    perfect = image_quality(pictures._replace(vae=images))["vae"]
    assert perfect.psnr == math.inf and perfect.ssim == pytest.approx(1)
