"""The photos and the VAE in `revq.assets`: complete, credited, small, and with the quality that the model card states."""

import csv
import hashlib
import json
import math

import pytest
import torch
from PIL import Image

from revq.assets import held_out_photos, train_photos, vae_folder
from revq.data.images import center_crop, load_image, to_tensor

PHOTOS = train_photos() + held_out_photos()
FOLDER = vae_folder().parent / "photos"
ALLOWED = ("public-domain", "CC0-", "CC-BY-")
WEIGHTS = vae_folder() / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sources() -> list[dict[str, str]]:
    """Return the rows of SOURCES.csv."""
    with (FOLDER / "SOURCES.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def vae():
    """Return the embedded VAE in single precision."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderDC.from_pretrained(
        vae_folder(), torch_dtype=torch.float32, low_cpu_mem_usage=False
    ).eval()


def test_every_photo_has_a_row_and_every_row_a_photo(sources):
    rows = [f"{row['split']}/{row['file']}" for row in sources]
    files = [f"{path.parent.name}/{path.name}" for path in PHOTOS]
    assert sorted(rows) == sorted(files)
    assert len(set(rows)) == len(rows)


def test_every_row_names_an_author_and_a_free_license(sources):
    for row in sources:
        assert row["author"].strip(), row["file"]
        assert row["license"].startswith(ALLOWED), row["file"]
        assert row["license_url"].startswith("https://creativecommons.org/"), row["file"]
        assert row["package"], row["file"]
        assert row["path"], row["file"]
        assert row["changes"], row["file"]


def test_counts_and_sizes():
    assert len(train_photos()) >= 90
    assert len(held_out_photos()) >= 24
    assert sum(path.stat().st_size for path in PHOTOS) <= 6e6
    for path in PHOTOS:
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert min(image.size) >= 128


def test_the_splits_share_nothing():
    assert not {path.name for path in train_photos()} & {path.name for path in held_out_photos()}
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in PHOTOS]
    assert len(set(digests)) == len(digests)


def test_both_splits_draw_on_every_source(sources):
    groups = {
        split: {row["file"].split("-")[0] for row in sources if row["split"] == split}
        for split in ("train", "held_out")
    }
    assert groups["train"] == groups["held_out"]


def test_the_held_out_list_is_the_held_out_folder():
    listed = (vae_folder() / "held_out.txt").read_text().split()
    assert listed == [path.name for path in held_out_photos()]
    assert len(listed) >= 48


def test_the_weights_are_small_and_fp16():
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size <= 4e6
    with safe_open(WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}


def test_latents_have_the_demo_geometry(vae):
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 128, 128)).latent
        assert latents.shape == (1, 32, 8, 8)
        assert vae.decode(latents).sample.shape == (1, 3, 128, 128)


def test_psnr_and_latents_are_as_the_card_says(vae):
    images = to_tensor([center_crop(load_image(path), 128) for path in held_out_photos()])
    with torch.no_grad():
        latents = vae.encode(images).latent
        result = vae.decode(latents).sample.clamp(-1, 1)
    psnr = (10 * torch.log10(4 / (result - images).square().mean((1, 2, 3)))).mean().item()
    recorded = json.loads((vae_folder() / "metrics.json").read_text())
    assert math.isclose(psnr, recorded["final"]["psnr_128"], abs_tol=0.05)
    assert recorded["final"]["psnr_128"] >= recorded["pca_start"]["psnr_128"] + 0.4
    assert f"{recorded['final']['psnr_128']:.2f}" in (vae_folder() / "README.md").read_text()
    # Each of the 2,048 elements is normalized by its own deviation, so none may be constant.
    spread = latents.std(0)
    assert spread.min() > 0.1 * spread.median()
