"""The demo on a tiny VAE and a few noise photos: its files, its numbers, both failures, and the files it may replace."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from tiny_vae import IMAGE_SIZE, LATENT_SHAPE, save_photos, save_tiny_vae

import revq
import revq.assets
from revq import recipes
from revq.config import ModelConfig, RectifierConfig
from revq.data.atomic import folder_lock
from revq.data.images import load_image
from revq.data.latents import LatentStore
from revq.demo import demo
from revq.errors import InputError
from revq.eval.evaluate import code_use, latent_errors
from revq.train.track import read_records


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    rectifier = RectifierConfig("mlp", 32, 1, form="residual")
    run = dataclasses.replace(
        recipes.demo(),
        model=ModelConfig(LATENT_SHAPE, 32, 16, rectifier=rectifier),
        train=dataclasses.replace(recipes.demo().train, epochs=3, batch_size=16),
    )
    return {
        "config": run,
        "crops": 100,
        "image_size": IMAGE_SIZE,
        "vae": revq.load_vae(save_tiny_vae(folder / "vae")),
        "photos": save_photos(folder / "photos", 12),
        "held_out": save_photos(folder / "held_out", 11, seed=1),
        "progress": False,
    }


def test_demo(tmp_path, parts, capsys):
    out = tmp_path / "runs" / "demo"
    result = demo(out, **parts)
    printed = capsys.readouterr().out
    written = {"comparison.png", "loss.png", "metrics.jsonl", "demo.json", "model", "latents", "checkpoint.pt"}
    assert {path.name for path in out.iterdir()} == written

    store, held_out = LatentStore(out / "latents" / "train"), LatentStore(out / "latents" / "held_out")
    assert (len(store), store.plan.crops, len(held_out)) == (108, 9, 11)  # 9 crops of 12 photos: at least 100
    tokenizer = revq.Tokenizer.from_pretrained(out / "model")
    assert result.numbers["utilization"] == code_use(tokenizer.model, store).utilization
    errors = latent_errors(tokenizer.model, held_out)
    assert result.numbers["latent_mse_quantized"] == pytest.approx(errors.quantized)
    assert result.numbers["latent_mse_rectified"] == pytest.approx(errors.rectified)
    assert result.numbers["bits_per_image"] == 32 * 4
    assert set(result.numbers["seconds"]) == {"load the VAE", "encode", "train", "evaluate"}
    saved = json.loads((out / "demo.json").read_text())
    assert {name: saved[name] for name in result.numbers} == json.loads(json.dumps(result.numbers))

    for text in (
        "VAE alone",
        "quantized and rectified",
        "PSNR",
        "SSIM",
        "utilization",
        "perplexity",
        "bits per image",
        "seconds, train",
    ):
        assert text in printed
    for name, quality in result.numbers["quality"].items():
        assert f"{quality['psnr']:.2f}" in printed and f"{quality['ssim']:.4f}" in printed, name
    assert any(kernel in printed for kernel in ("native: ", "reference: ")) and str(out / "comparison.png") in printed
    with Image.open(out / "comparison.png") as picture:
        assert picture.size == (4 * (IMAGE_SIZE + 4) + 4, 22 + 8 * (IMAGE_SIZE + 4 + 16))
    assert len([r for r in read_records(out / "metrics.jsonl") if r["kind"] == "epoch"]) == 3

    pictures = [torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1]
    tokens = tokenizer.encode(pictures[0])
    assert tokens.shape == (2, 32)
    assert torch.equal(tokenizer.decode(tokens), revq.Tokenizer.from_pretrained(out / "model").decode(tokens))


def test_demo_again_replaces_its_own_files_only(tmp_path, parts):
    few = {
        **parts,
        "config": dataclasses.replace(parts["config"], train=dataclasses.replace(parts["config"].train, epochs=1)),
    }
    first = demo(tmp_path, **few)
    (tmp_path / "notes.txt").write_text("mine")
    second = demo(tmp_path, **few)
    for name in ("quality", "latent_mse_rectified", "utilization", "perplexity"):
        assert first.numbers[name] == second.numbers[name]
    assert (tmp_path / "notes.txt").read_text() == "mine"

    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    (other / "model" / "weights").write_text("mine")
    with pytest.raises(InputError, match="of another origin"):
        demo(other, **few)
    assert [path.name for path in other.rglob("*")] == ["model", "weights"]
    third = demo(other, **few, overwrite=True)
    assert third.numbers["quality"] == first.numbers["quality"] and not (other / "model" / "weights").exists()


def test_one_demo_at_a_time(tmp_path, parts):
    """A second process does not remove the files of the first, nor those of a run in the same folder."""
    (tmp_path / "demo.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    for held in (tmp_path, tmp_path / "demo"):
        with folder_lock(held), pytest.raises(InputError, match="another process"):
            demo(tmp_path, **parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "metrics.jsonl"]


def test_demo_fails_when_the_method_does(tmp_path, parts):
    run = parts["config"]
    identity = dataclasses.replace(run.model, rectifier=RectifierConfig("identity"))
    quick = dataclasses.replace(run.train, epochs=1, init="normal", learning_rate=1e-9)
    result = demo(tmp_path, **{**parts, "config": dataclasses.replace(run, model=identity, train=quick)})
    assert len(result.failures) == 2
    assert "lowers the held-out latent MSE by 0.00%" in result.failures[0] and "utilization is" in result.failures[1]


def test_shipped_parts(tmp_path, capsys):
    """The embedded VAE and the shipped photos, in seconds instead of minutes."""
    photos, held_out = revq.assets.train_photos(), revq.assets.held_out_photos()
    assert (
        len(photos) >= 90
        and len(held_out) >= 24
        and not {path.name for path in photos} & {path.name for path in held_out}
    )
    run = recipes.demo()
    rectifier = RectifierConfig("mlp", 32, 1, form="residual")
    short = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, num_codes=16, rectifier=rectifier),
        train=dataclasses.replace(run.train, epochs=2, batch_size=16),
    )
    result = demo(tmp_path, config=short, crops=48, photos=photos[:24], held_out=held_out[:4], progress=False)
    assert result.numbers["vae"] == "embedded" and result.numbers["num_tokens"] == 512
    quality = result.numbers["quality"]
    assert quality["vae"]["psnr"] > quality["quantized"]["psnr"] > 10
    assert quality["vae"]["psnr"] > 20
    tokenizer = revq.Tokenizer.from_pretrained(tmp_path / "model")
    image = load_image(held_out[0])
    assert tokenizer.encode([image]).shape == (1, 512)
