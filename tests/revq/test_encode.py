"""Encoding: rows are the encoder's latents of the right crops, whatever the folder held before or holds now."""

import os
import shutil

import pytest
import torch
from tiny_vae import IMAGE_SIZE, LATENT_SHAPE, save_photos, save_tiny_vae

from revq.data.encode import encode_folder
from revq.data.images import center_crop, load_image, to_tensor
from revq.data.vae import load_vae
from revq.errors import InputError

NAMES = [f"photo-{number:02d}.png" for number in range(1, 7)] + ["sub/photo-00.png"]
ROW_BYTES = 4 * 4 * 8 * 8


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_vae(save_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    save_photos(folder, 7)
    return folder


def encode(photos, vae, out, **options):
    return encode_folder(
        photos, vae, **({"image_size": IMAGE_SIZE, "out": out, "batch_size": 4, "progress": False} | options)
    )


def latents_of(vae, photos, names):
    """What the store must hold, from the pictures themselves."""
    return vae.encode(to_tensor([center_crop(load_image(photos / name), IMAGE_SIZE) for name in names]))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def inodes_of(folder):
    return {path.stat().st_ino for path in folder.glob("latents-*")}


def change(path):
    """Another picture in a file of the same size and time: uncompressed, so that only a look at the bytes tells."""
    status = path.stat()
    load_image(path).rotate(90).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def test_center_crops(tmp_path, vae, photos):
    store = encode(photos, vae, tmp_path / "s")
    assert (store.shape, list(store.names), store.skipped) == (LATENT_SHAPE, NAMES, [])
    assert (store.plan.vae, store.plan.vae_fingerprint, store.plan.image_size) == (
        vae.name,
        vae.fingerprint,
        IMAGE_SIZE,
    )
    torch.testing.assert_close(store.rows(range(7)), latents_of(vae, photos, NAMES), rtol=1e-4, atol=1e-4)
    assert store.rows(range(7)).std() > 0


def test_mirrored_crops(tmp_path, vae, photos):
    store = encode(photos, vae, tmp_path / "s", mirrored=True)
    pixels = to_tensor([center_crop(load_image(photos / name), IMAGE_SIZE) for name in NAMES])
    torch.testing.assert_close(store.rows(range(7), "mirrored"), vae.encode(pixels.flip(3)), rtol=1e-4, atol=1e-4)


def test_random_crops_depend_on_the_seed_and_the_picture(tmp_path, vae, photos):
    first = encode(photos, vae, tmp_path / "a", crops=3, seed=1)
    assert len(first) == 21
    assert encode(photos, vae, tmp_path / "b", crops=3, seed=1).fingerprint == first.fingerprint
    other = encode(photos, vae, tmp_path / "c", crops=3, seed=2)
    rows = first.rows(range(21)).flatten(1)
    assert not torch.equal(rows, other.rows(range(21)).flatten(1))
    assert torch.pdist(rows).min() > 1e-3  # no two crops are the same
    (photos / NAMES[0]).unlink()
    (photos / NAMES[3]).rename(photos / "another name.png")
    fewer = encode(photos, vae, tmp_path / "d", crops=3, seed=1)
    moved = [NAMES[3], *NAMES[1:3], *NAMES[4:]]  # in the order of the new names
    expected = torch.cat([first.rows(range(3 * i, 3 * i + 3)) for i in map(NAMES.index, moved)])
    torch.testing.assert_close(fewer.rows(range(18)), expected, rtol=1e-4, atol=1e-4)


def test_interrupted_and_called_again(tmp_path, vae, photos, monkeypatch):
    whole = encode(photos, vae, tmp_path / "whole", crops=3, shard_bytes=6 * ROW_BYTES)
    calls = []

    def encode_twice(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return type(vae).encode(vae, images)

    monkeypatch.setattr(vae, "encode", encode_twice)
    with pytest.raises(KeyboardInterrupt):
        encode(photos, vae, tmp_path / "s", crops=3, shard_bytes=6 * ROW_BYTES)
    assert not (tmp_path / "s").exists()
    again = encode(photos, vae, tmp_path / "s", crops=3, shard_bytes=6 * ROW_BYTES)
    assert calls == [4, 2, 4, 2] + [4, 2] * 2 + [3]  # the first of four shards was kept
    assert again.fingerprint == whole.fingerprint
    assert files_of(again.folder) == files_of(whole.folder)


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("kind", ["replaced", "removed", "added", "damaged", "renamed"])
def test_a_changed_folder(tmp_path, vae, photos, kind, place):
    """The store follows its folder: other shards stay as they are, no row is that of an earlier picture."""
    before = encode(photos, vae, tmp_path / "s", shard_bytes=2 * ROW_BYTES)
    old, name, skipped = inodes_of(before.folder), NAMES[place], []
    if kind == "replaced":
        shutil.copy(photos / NAMES[place - 1], photos / name)
    elif kind == "removed":
        (photos / name).unlink()
    elif kind == "added":
        shutil.copy(photos / name, photos / (name.removesuffix(".png") + "-copy.png"))
    elif kind == "damaged":
        (photos / name).write_bytes((photos / name).read_bytes()[:300])
        skipped = [name]
    else:
        (photos / name).rename(photos / (name.removesuffix(".png") + "-renamed.png"))
    after = encode(photos, vae, tmp_path / "s", shard_bytes=2 * ROW_BYTES)
    names = sorted(
        (path.relative_to(photos).as_posix() for path in photos.rglob("*.png")), key=lambda name: name.split("/")
    )
    assert [name for name, _ in after.skipped] == skipped
    expected = [name for name in names if name not in skipped]
    assert list(after.names) == expected
    torch.testing.assert_close(after.rows(range(len(after))), latents_of(vae, photos, expected), rtol=1e-4, atol=1e-4)
    kept = len(old & inodes_of(after.folder))
    assert kept == 4 or (kept == 3 and (kind != "added" or place % 2)), "at most one of four shards was written again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "s"]


def test_the_bytes_count_and_not_the_name_size_or_time(tmp_path, vae, photos):
    for path in photos.rglob("*.png"):
        load_image(path).save(path.with_suffix(".bmp"))
        path.unlink()
    for unfinished in (False, True):
        encode(photos, vae, tmp_path / "s", shard_bytes=2 * ROW_BYTES, overwrite=True)
        if unfinished:
            (tmp_path / "s").rename(tmp_path / "s.partial")
        change(photos / "photo-03.bmp")
        trusting = shutil.copytree(tmp_path / ("s.partial" if unfinished else "s"), tmp_path / "t")
        names = [name.replace("png", "bmp") for name in NAMES]
        old = latents_of(vae, photos, names)
        stale = encode(photos, vae, trusting, shard_bytes=2 * ROW_BYTES, trust_mtime=True).rows(range(7))
        assert not torch.allclose(stale, old, atol=1e-2), "as it was asked: the time was trusted"
        store = encode(photos, vae, tmp_path / "s", shard_bytes=2 * ROW_BYTES)
        torch.testing.assert_close(store.rows(range(7)), latents_of(vae, photos, names), rtol=1e-4, atol=1e-4)
        shutil.rmtree(trusting)


def test_a_damaged_picture_is_left_out_or_stops(tmp_path, vae, photos):
    for name in (NAMES[0], NAMES[6]):
        (photos / name).write_bytes((photos / name).read_bytes()[:300])
    with pytest.raises(InputError, match=r"photo-01\.png"):
        encode(photos, vae, tmp_path / "s", on_error="stop")
    store = encode(photos, vae, tmp_path / "s", shard_bytes=2 * ROW_BYTES)
    assert [name for name, _ in store.skipped] == [NAMES[0], NAMES[6]]
    assert all("cannot read" in reason and str(tmp_path) not in reason for _, reason in store.skipped)
    files = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    again = encode(photos, vae, tmp_path / "s", shard_bytes=2 * ROW_BYTES)
    assert again.skipped == store.skipped
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == files, "nothing was written"


def test_bad_input_leaves_nothing(tmp_path, vae, photos):
    bad = tmp_path / "bad"
    for path in save_photos(bad, 3):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="at least one image that can be read"):
        encode(bad, vae, tmp_path / "s")
    with pytest.raises(InputError, match="missing"):
        encode(tmp_path / "missing", vae, tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        encode(tmp_path / "empty", vae, tmp_path / "s")
    for wrong in ({"image_size": 30}, {"crops": -1}, {"min_scale": 0}, {"on_error": "x"}, {"shard_bytes": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            encode(photos, vae, tmp_path / "s", **wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty", "photos"]


def test_a_finished_store_is_returned_for_the_same_command_only(tmp_path, vae, photos):
    store = encode(photos, vae, tmp_path / "s", crops=2)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    again = encode(photos, vae, tmp_path / "s", crops=2)
    assert again.fingerprint == store.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == files, "nothing was written"
    for options, message in (
        ({"crops": 2, "min_scale": 0.9}, "min_scale was 0.5 and is 0.9"),
        ({"crops": 2, "seed": 1}, "seed was 0 and is 1"),
        ({"crops": 3, "dtype": "float16"}, "crops was 2 and is 3, dtype was 'float32' and is 'float16'"),
    ):
        with pytest.raises(InputError, match=message):
            encode(photos, vae, tmp_path / "s", **options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == files, "nothing was written"
    other = encode(photos, vae, tmp_path / "s", crops=3, overwrite=True)
    assert (other.plan.crops, len(other)) == (3, 21)
    assert [path.name for path in tmp_path.iterdir() if path.name != "photos"] == ["s"]
