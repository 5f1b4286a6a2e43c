"""Images to tensors and back: exact inverses, the geometry of crops, and a one-line message for each bad file."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from revq.data.images import center_crop, list_images, load_image, random_crop, to_pil, to_tensor
from revq.errors import InputError


def gradient(width, height):
    """Red is proportional to the column, green to the row; blue is 128."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.stack([x * 255, y * 255, 0 * x + 128], axis=-1).round().astype(np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=-1))
    tensor = to_tensor([image, image.rotate(180)])
    assert tensor.shape == (2, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.min() == -1
    assert tensor.max() == 1
    back = to_pil(tensor)
    assert np.array_equal(pixels(back[0]), pixels(image))
    assert np.array_equal(pixels(back[1]), pixels(image.rotate(180)))


def test_channels_and_axes_keep_their_places():
    tensor = to_tensor([gradient(8, 4)])
    assert tensor.shape == (1, 3, 4, 8)
    assert (tensor[0, 0].diff(dim=1) > 0).all()
    assert (tensor[0, 1].diff(dim=0) > 0).all()
    torch.testing.assert_close(tensor[0, 2], torch.full((4, 8), 128 / 127.5 - 1))


def test_to_pil_rounds_to_nearest_and_clamps():
    values = torch.tensor([-7.0, -1.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1, 1.0, 3.0])
    picture = to_pil(values.view(1, 1, 1, 6).expand(1, 3, 1, 6))[0]
    assert pixels(picture)[0, :, 0].tolist() == [0, 0, 100, 101, 255, 255]


def test_tensors_of_other_kinds_are_refused():
    with pytest.raises(InputError, match=r"expected float \[B, 3, H, W\], got torch.uint8"):
        to_pil(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"got torch.float32 \(3, 4, 4\)"):
        to_pil(torch.zeros(3, 4, 4))
    with pytest.raises(InputError, match=r"all of one size, got sizes \[\(2, 2\), \(3, 2\)\]"):
        to_tensor([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])
    with pytest.raises(InputError, match="at least one"):
        to_tensor([])


def test_center_crop_cuts_the_middle():
    image = Image.new("RGB", (30, 10))
    image.paste((255, 0, 0), (10, 0, 20, 10))
    assert np.array_equal(pixels(center_crop(image, 10)), np.tile([255, 0, 0], (10, 10, 1)))


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (64, 64), (20, 33)], ids=str)
def test_center_crop_scales_the_short_side_and_keeps_the_aspect(size):
    cropped = center_crop(gradient(*size), 32)
    assert cropped.size == (32, 32)
    middle, width, height = pixels(cropped)[14:18, 14:18].mean((0, 1)), *size
    np.testing.assert_allclose(middle[:2], 127.5, atol=4)
    slope_x = (pixels(cropped)[16, 24, 0] - pixels(cropped)[16, 8, 0]) / 255
    slope_y = (pixels(cropped)[24, 16, 1] - pixels(cropped)[8, 16, 1]) / 255
    short = min(size)
    assert slope_x == pytest.approx(short / width / 2, abs=0.03)
    assert slope_y == pytest.approx(short / height / 2, abs=0.03)


def test_random_crops_are_mirrored_squares_of_all_sizes():
    image, rng = gradient(120, 60), random.Random(0)
    sides, mirrored, centers = [], 0, []
    for _ in range(200):
        crop = random_crop(image, 24, rng, min_scale=0.25)
        assert crop.size == (24, 24)
        picture = pixels(crop)
        across, down = (picture[:, -1, 0] - picture[:, 0, 0]).mean(), (picture[-1, :, 1] - picture[0, :, 1]).mean()
        mirrored += across < 0
        scale = 24 / 23 / 255  # 24 pixels span 23 distances between pixel centers
        side_x, side_y = abs(across) * scale * 120, down * scale * 60
        assert side_x == pytest.approx(side_y, abs=3), "a crop is a square"
        sides.append(side_y / 60)
        centers.append((picture[..., 0].mean() / 255, picture[..., 1].mean() / 255))
    assert 0.23 < min(sides) < 0.32
    assert 0.93 < max(sides) < 1.03
    assert 70 < mirrored < 130
    spread = np.ptp(np.array(centers), axis=0)
    assert spread[0] > 0.7
    assert spread[1] > 0.5


def test_random_crops_depend_on_the_generator_alone():
    image = gradient(50, 70)
    first = [random_crop(image, 16, random.Random(4), 0.5).tobytes() for _ in range(2)]
    rng = random.Random(4)
    others = [random_crop(image, 16, rng, 0.5).tobytes() for _ in range(2)]
    assert first[0] == first[1] == others[0]
    assert others[0] != others[1]


def test_min_scale_one_is_the_whole_short_side():
    for seed in range(8):
        crop = pixels(random_crop(gradient(40, 40), 40, random.Random(seed), 1.0))
        assert np.array_equal(crop if crop[0, 0, 0] < crop[0, -1, 0] else crop[:, ::-1], pixels(gradient(40, 40)))


@pytest.mark.parametrize("scale", [0, -1, 1.5])
def test_unusable_crop_options_are_refused(scale):
    with pytest.raises(InputError, match=r"min_scale: expected a share in \(0, 1\]"):
        random_crop(gradient(8, 8), 4, random.Random(0), scale)
    with pytest.raises(InputError, match="size: expected at least 1"):
        center_crop(gradient(8, 8), 0)


def test_exif_orientation_is_applied(tmp_path):
    upright = gradient(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to see it upright
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert loaded.size == (20, 10)
    assert np.array_equal(pixels(loaded), pixels(upright))


def test_other_modes_become_rgb(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "gray.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "alpha.png")
    Image.fromarray(np.full((4, 4), 257 * 200, dtype=np.uint16)).save(tmp_path / "gray16.png")
    for name, color in (("gray", [77] * 3), ("alpha", [1, 2, 3]), ("gray16", [200] * 3)):
        image = load_image(tmp_path / f"{name}.png")
        assert image.mode == "RGB"
        assert pixels(image)[0, 0].tolist() == color


def test_bad_files_give_one_line(tmp_path):
    gradient(64, 64).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.webp").write_bytes(b"")
    for name, reason in (("cut.jpg", "(?i)truncated"), ("text.png", "not an image"), ("empty.webp", "not an image")):
        with pytest.raises(InputError, match=reason) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="expected an image file, found nothing"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(InputError, match="found a folder"):
        load_image(tmp_path)


def test_images_are_listed_sorted_with_subfolders_and_without_others(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.PNG", "a.jpeg", "b/c.webp", "b/a.jpg", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.jpeg", "b/a.jpg", "b/c.webp", "z.PNG"]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one image"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="found nothing"):
        list_images(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="found a file"):
        list_images(tmp_path / "file")
