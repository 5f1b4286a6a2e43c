"""Encoding: rows are the encoder's latents of the right crops; an interrupted or failed run leaves no partial store."""

import pytest
import torch
from tiny_vae import IMAGE_SIZE, LATENT_SHAPE, save_photos, save_tiny_vae

from revq.data.encode import encode_folder
from revq.data.images import center_crop, load_image, to_tensor
from revq.data.vae import load_vae
from revq.errors import InputError


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_vae(save_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, 7)
    return folder


def encode(photos, vae, out, **options):
    return encode_folder(
        photos, vae, **({"image_size": IMAGE_SIZE, "out": out, "batch_size": 4, "progress": False} | options)
    )


def test_center_crops(tmp_path, vae, photos):
    store = encode(photos, vae, tmp_path / "s")
    names = [f"photo-{number:02d}.png" for number in range(1, 7)] + ["sub/photo-00.png"]
    assert (store.shape, list(store.plan.sources)) == (LATENT_SHAPE, names)
    assert (store.plan.vae, store.plan.vae_fingerprint, store.plan.image_size) == (
        vae.name,
        vae.fingerprint,
        IMAGE_SIZE,
    )
    images = to_tensor([center_crop(load_image(photos / name), IMAGE_SIZE) for name in names])
    torch.testing.assert_close(store.rows(range(7)), vae.encode(images), rtol=1e-4, atol=1e-4)
    assert store.rows(range(7)).std() > 0


def test_random_crops_depend_on_the_seed_alone(tmp_path, vae, photos):
    first = encode(photos, vae, tmp_path / "a", crops=3, seed=1)
    assert len(first) == 21
    assert encode(photos, vae, tmp_path / "b", crops=3, seed=1).fingerprint == first.fingerprint
    other = encode(photos, vae, tmp_path / "c", crops=3, seed=2)
    rows = first.rows(range(21)).flatten(1)
    assert not torch.equal(rows, other.rows(range(21)).flatten(1))
    assert torch.pdist(rows).min() > 1e-3  # no two crops are the same


def test_interrupted_and_called_again(tmp_path, vae, photos, monkeypatch):
    row_bytes = 4 * 4 * 8 * 8
    whole = encode(photos, vae, tmp_path / "whole", crops=3, shard_bytes=5 * row_bytes)
    calls = []

    def encode_twice(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return type(vae).encode(vae, images)

    monkeypatch.setattr(vae, "encode", encode_twice)
    with pytest.raises(KeyboardInterrupt):
        encode(photos, vae, tmp_path / "s", crops=3, shard_bytes=5 * row_bytes)
    assert not (tmp_path / "s").exists()
    again = encode(photos, vae, tmp_path / "s", crops=3, shard_bytes=5 * row_bytes)
    assert calls == [4, 1, 4, 1] + [4, 1] * 3 + [1]  # the first of five shards was kept
    assert again.fingerprint == whole.fingerprint


def test_bad_images_leave_nothing(tmp_path, vae, photos):
    bad = tmp_path / "bad"
    paths = save_photos(bad, 3)
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"photo-02\.png"):
        encode(bad, vae, tmp_path / "s")
    with pytest.raises(InputError, match="missing"):
        encode(tmp_path / "missing", vae, tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        encode(tmp_path / "empty", vae, tmp_path / "s")
    with pytest.raises(InputError, match="image_size"):
        encode(photos, vae, tmp_path / "s", image_size=30)
    with pytest.raises(InputError, match="crops"):
        encode(photos, vae, tmp_path / "s", crops=-1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty"]


def test_a_finished_store_is_returned_for_the_same_command_only(tmp_path, vae, photos):
    store = encode(photos, vae, tmp_path / "s", crops=2)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    again = encode(photos, vae, tmp_path / "s", crops=2)
    assert again.fingerprint == store.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == files, "nothing was written"
    save_photos(tmp_path / "others", 7)
    changed = sorted((tmp_path / "others").rglob("*.png"))[0]
    center_crop(load_image(changed), IMAGE_SIZE // 2).save(changed)  # the same names, another image
    for options in ({"crops": 2, "min_scale": 0.9}, {"crops": 2, "seed": 1}, {"crops": 3}):
        with pytest.raises(InputError, match="expected a new or empty folder"):
            encode(photos, vae, tmp_path / "s", **options)
    with pytest.raises(InputError, match="expected a new or empty folder"):
        encode(tmp_path / "others", vae, tmp_path / "s", crops=2)
