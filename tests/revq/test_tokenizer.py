"""Images to tokens and back: the same folder gives the same images bit for bit in any process."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny_vae import IMAGE_SIZE, LATENT_SHAPE, save_photos, save_tiny_vae

from revq.config import ModelConfig, RectifierConfig
from revq.data.images import center_crop, load_image, to_pil, to_tensor
from revq.data.latent_writer import save_latents
from revq.data.tokens import load_tokens
from revq.data.vae import load_vae
from revq.errors import InputError
from revq.eval.evaluate import code_use
from revq.model.normalizer import LatentStatistics
from revq.model.revq import ReVQ
from revq.tokenizer import Tokenizer, tokenize_store


def tiny_model():
    torch.manual_seed(2)
    rectifier = RectifierConfig("efficientvit", width=32, layers=1)
    return ReVQ(ModelConfig(LATENT_SHAPE, num_tokens=32, num_codes=16, rectifier=rectifier))


@pytest.fixture
def tokenizer(tmp_path):
    vae, model = load_vae(save_tiny_vae(tmp_path / "vae")), tiny_model()
    statistics = LatentStatistics()
    statistics.update(vae.encode(torch.rand(8, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1))
    model.normalizer.fit_(statistics)
    return Tokenizer(model, vae, IMAGE_SIZE)


@pytest.fixture
def photos(tmp_path):
    return [load_image(path) for path in save_photos(tmp_path / "photos", 3)]


def test_it_joins_the_vae_and_the_model(tokenizer, photos):
    images = to_tensor([center_crop(photo, IMAGE_SIZE) for photo in photos])
    indices = tokenizer.encode(images)
    assert indices.shape == (3, 32)
    assert len({tuple(row) for row in indices.tolist()}) == 3, "other photos, other tokens"
    assert torch.equal(indices, tokenizer.model.encode_latents(tokenizer.vae.encode(images)))
    pictures = tokenizer.decode(indices)
    assert pictures.shape == images.shape
    assert torch.equal(pictures, tokenizer.vae.decode(tokenizer.model.decode_tokens(indices)))
    assert torch.equal(tokenizer.reconstruct(images), pictures)


def test_pil_images_of_any_size_are_center_cropped(tokenizer, photos):
    images = to_tensor([center_crop(photo, IMAGE_SIZE) for photo in photos])
    mixed = [photos[0], center_crop(photos[1], IMAGE_SIZE), photos[2]]
    assert torch.equal(tokenizer.encode(mixed), tokenizer.encode(images))
    assert torch.equal(tokenizer.reconstruct(photos), tokenizer.reconstruct(images))


def test_tokenizing_changes_no_count_and_no_gradient(tokenizer, photos):
    assert not tokenizer.model.training
    assert not tokenizer.reconstruct(photos).requires_grad
    assert tokenizer.model.quantizer.count.sum() == 0


def test_a_new_process_gives_the_same_tokens_and_images(tokenizer, photos, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    indices = tokenizer.encode(photos)
    pictures = b"".join(picture.tobytes() for picture in to_pil(tokenizer.decode(indices)))
    script = f"""
        import hashlib, json, sys, torch
        from pathlib import Path
        import revq
        from revq.data.images import load_image, to_pil
        torch.set_num_threads({torch.get_num_threads()})
        tokenizer = revq.Tokenizer.from_pretrained({str(tmp_path / "model")!r})
        indices = torch.tensor({indices.tolist()})
        pictures = b"".join(picture.tobytes() for picture in to_pil(tokenizer.decode(indices)))
        paths = json.loads({json.dumps([str(p) for p in photo_paths(tmp_path)])!r})
        print(json.dumps([hashlib.sha256(pictures).hexdigest(), tokenizer.encode([load_image(p) for p in paths]).tolist()]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    digest, tokens = json.loads(done.stdout.splitlines()[-1])
    assert digest == hashlib.sha256(pictures).hexdigest()
    assert tokens == indices.tolist()


def photo_paths(tmp_path):
    folder = tmp_path / "photos"
    return [folder / "sub" / "photo-00.png", folder / "photo-01.png", folder / "photo-02.png"]


def test_the_folder_names_the_vae_and_knows_its_weights(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    values = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    assert values.pop("checksum") and values.pop("format") == "revq-tokenizer-2"
    assert values == {
        "vae": str(tmp_path / "vae"),
        "vae_fingerprint": tokenizer.vae.fingerprint,
        "image_size": IMAGE_SIZE,
    }
    for name, other in (("vae", "other"), ("image_size", 64), ("format", "revq-tokenizer-3"), ("format", None)):
        whole = (tmp_path / "model" / "tokenizer.json").read_text()
        (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(json.loads(whole) | {name: other}))
        with pytest.raises(InputError, match="checksum"):
            Tokenizer.from_pretrained(tmp_path / "model")
        (tmp_path / "model" / "tokenizer.json").write_text(whole)
    del values["vae"]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="expected JSON with vae"):
        Tokenizer.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(values | {"vae": str(tmp_path / "vae")}))
    Tokenizer.from_pretrained(tmp_path / "model")  # of the first version, without a checksum
    assert ReVQ.from_pretrained(tmp_path / "model").config == tokenizer.model.config


def test_another_vae_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    save_tiny_vae(tmp_path / "vae", seed=1)  # the same folder, other weights
    with pytest.raises(InputError, match=r"tokenizer\.json: made with a VAE of fingerprint .* its weights are others"):
        Tokenizer.from_pretrained(tmp_path / "model")


def test_a_vae_that_moved_can_be_pointed_at(tokenizer, photos, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "vae").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="vae: expected a VAE folder"):
        Tokenizer.from_pretrained(tmp_path / "model")
    for vae in (tmp_path / "moved", tokenizer.vae):
        loaded = Tokenizer.from_pretrained(tmp_path / "model", vae=vae)
        assert torch.equal(loaded.encode(photos), tokenizer.encode(photos))


def test_a_model_that_does_not_fit_the_vae_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"model reads latents \(4, 8, 8\), but .* gives \(4, 16, 16\) at 64 pixels"):
        Tokenizer(tokenizer.model, tokenizer.vae, 64)
    with pytest.raises(InputError, match="image_size: expected a multiple of the VAE's 4, got 30"):
        Tokenizer(tokenizer.model, tokenizer.vae, 30)


def test_unusable_inputs_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"images: expected shape \[B, 3, 32, 32\], got \[1, 3, 64, 64\]"):
        tokenizer.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="at least one"):
        tokenizer.encode([])
    with pytest.raises(InputError, match="num_codes=16"):
        tokenizer.decode(torch.full((1, 32), 16))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"vae": "embedded"}', '{"vae": 1, "vae_fingerprint": "", "image_size": "x"}']
)
def test_a_damaged_tokenizer_file_is_named(tokenizer, tmp_path, text):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json: expected JSON with vae, vae_fingerprint and image_size"):
        Tokenizer.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"expected a model folder with tokenizer\.json, which is missing"):
        Tokenizer.from_pretrained(tmp_path / "model")


def test_importing_revq_is_light_and_its_names_are_lazy():
    script = """
        import sys
        import revq
        assert not {"torch", "diffusers", "PIL", "matplotlib", "triton"} & sys.modules.keys()
        import revq.model.revq, revq.tokenizer, revq.data.vae, revq.data.images, revq.eval.metrics, revq.model.rectifier
        heavy = {"diffusers", "PIL", "matplotlib", "triton", "huggingface_hub", "tyro"} & sys.modules.keys()
        assert not heavy, heavy
        for name in revq.__all__:
            assert getattr(revq, name) is not None, name
        assert revq.train.loop.train and revq.recipes.demo and revq.Tokenizer is revq.tokenizer.Tokenizer
        assert set(revq.__all__) <= set(dir(revq))
        try:
            revq.nonsense
        except AttributeError as error:
            assert "nonsense" in str(error)
        else:
            raise AssertionError
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr


def test_many_images_are_searched_through_a_tree_with_the_same_tokens(tokenizer, tmp_path, monkeypatch):
    latents = torch.randn(40, *LATENT_SHAPE)
    expected = tokenizer.model.encode_latents(latents)
    assert not tokenizer.build_index(10**9), "the codebook is too small for a tree"
    monkeypatch.setattr("revq.model.revq.tree_pays", lambda codes, dim, queries: (codes, queries) == (16, 40))
    assert not tokenizer.build_index(39) and tokenizer.model.quantizer.index is None
    assert tokenizer.build_index(40)
    assert torch.equal(tokenizer.model.encode_latents(latents), expected)
    assert tokenizer.model.quantizer.index.last.queries > 0
    tokenizer.model.train()
    assert tokenizer.model.quantizer.index is None and not tokenizer.build_index(40)
    tokenizer.model.eval()

    store = save_latents(tmp_path / "store", latents)
    tokenize_store(tokenizer.model, store, tmp_path / "tokens.safetensors", progress=False)
    assert tokenizer.model.quantizer.index is not None
    assert torch.equal(load_tokens(tmp_path / "tokens.safetensors").indices, expected)
    tokenizer.model.train().eval()
    assert code_use(tokenizer.model, store).utilization > 0 and tokenizer.model.quantizer.index is not None
