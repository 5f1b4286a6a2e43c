"""What the tokenizer takes as images: each kind gives the batch of a float64 computation, anything else one line."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_tokenizer import tiny_model, tokenizer  # noqa: F401  the fixture
from tiny_vae import IMAGE_SIZE, save_photos

from revq.data.image_batch import ImageBatches
from revq.data.images import center_crop, load_image
from revq.errors import InputError

SIZE = IMAGE_SIZE
LEVELS = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy((LEVELS.astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2))  # float64


def close(batch, expected=EXPECTED):
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    torch.testing.assert_close(batch.double(), expected, rtol=0, atol=2e-7)


def test_tensors_of_every_range():
    levels, batches = torch.from_numpy(LEVELS).permute(0, 3, 1, 2), ImageBatches(SIZE)
    for images, declared in (
        (levels, (-1, 1)),
        (levels, (0, 1)),
        (levels.float(), (0, 255)),
        (levels.half(), [0, 255]),
    ):
        close(batches(images, declared))
    close(batches(levels.float() / 255, (0, 1)))
    close(batches(levels.double() / 255, (0.0, 1.0)))
    close(batches(EXPECTED))
    close(batches(EXPECTED[1]), EXPECTED[1:2])
    close(batches(levels[2]), EXPECTED[2:])
    half = batches(EXPECTED.to(torch.bfloat16))
    assert torch.equal(half, EXPECTED.to(torch.bfloat16).float())
    assert batches(EXPECTED.float().requires_grad_()).requires_grad is False
    assert batches(EXPECTED[:0]).shape == (0, 3, SIZE, SIZE)


def test_arrays_pil_images_and_files(tmp_path):
    pictures, batches = [Image.fromarray(levels) for levels in LEVELS], ImageBatches(SIZE)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    for images in (
        LEVELS,
        list(LEVELS),
        pictures,
        tuple(pictures),
        files,
        [str(file) for file in files],
        [pictures[0], files[1], LEVELS[2]],
        [Image.open(files[0]), str(files[1]), LEVELS[2]],
        np.asfortranarray(LEVELS),
    ):
        close(batches(images))
    for image in (LEVELS[0], pictures[0], files[0], str(files[0]), LEVELS[:1], [pictures[0]]):
        close(batches(image), EXPECTED[:1])


def test_other_sizes_are_center_cropped(tmp_path):
    path = save_photos(tmp_path, 1)[0]
    photo = load_image(path)
    expected = torch.from_numpy(np.asarray(center_crop(photo, SIZE)).astype(np.float64) / 127.5 - 1).permute(2, 0, 1)[
        None
    ]
    for image in (path, str(path), photo, np.asarray(photo), np.asarray(photo)[None]):
        close(ImageBatches(SIZE)(image), expected)


def test_pil_images_follow_the_rules_of_files(tmp_path):
    rgba = np.full((SIZE, SIZE, 4), (10, 20, 30, 0), dtype=np.uint8)  # hidden color below full transparency
    deep = np.full((SIZE, SIZE), 65535 // 2, dtype=np.uint16)
    for number, (pixels, level) in enumerate(((rgba, 255), (deep, 127))):
        picture, path = Image.fromarray(pixels), tmp_path / f"{number}.png"
        picture.save(path)
        batch = ImageBatches(SIZE)(picture)
        assert torch.equal(batch, ImageBatches(SIZE)(path))
        assert batch.unique().item() == pytest.approx(level / 127.5 - 1)
    with pytest.raises(
        InputError, match=r"images: cannot read this image \(floats have a defined range only in \[0, 1\]"
    ):
        ImageBatches(SIZE)(Image.fromarray(np.full((SIZE, SIZE), 7.0, dtype=np.float32)))


def test_floats_outside_the_declared_range():
    good = torch.full((2, 3, SIZE, SIZE), -0.5)
    for value, declared, found in (
        (1.001, (-1, 1), "-0.5 to 1.001"),
        (255.0, (-1, 1), "-0.5 to 255"),
        (-2.0, (-1, 1), "-2 to -0.5"),
        (0.5, (0, 1), "-0.5 to 0.5"),
        (7.0, (0, 255), "-0.5 to 7"),
        (float("inf"), (-1, 1), "-0.5 to inf"),
        (float("-inf"), (0, 255), "-inf to -0.5"),
        (float("nan"), (-1, 1), "NaN"),
        (float("nan"), (0, 255), "NaN"),
    ):
        images = good.clone()
        images[1, 2, 3, 4] = value
        others = " or ".join(f"image_range={r}" for r in ((-1, 1), (0, 1), (0, 255)) if r != declared)
        expected = f"images: expected values in {list(declared)}, got {found}; to declare another range, pass {others}"
        with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
            ImageBatches(SIZE)(images, declared)
    with pytest.raises(InputError, match=r"got -0\.5 to inf"):
        ImageBatches(SIZE)(torch.where(images.isnan(), 1e300, images.double()))


def test_a_unit_range_warns():
    unit, batches = torch.rand(2, 3, SIZE, SIZE), ImageBatches(SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(unit, (0, 1))
        batches(unit - 0.5)
        batches((unit * 255).byte())
        batches(unit * 200, (0, 255))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(batches(unit), unit)
    assert [warning.category for warning in seen] == [UserWarning] * 2
    assert "read as [-1, 1]" in str(seen[0].message) and "image_range=(0, 1)" in str(seen[0].message)
    with pytest.warns(UserWarning, match=r"read as \[0, 255\]"):
        ImageBatches(SIZE)(unit, (0, 255))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(1, 3, SIZE, SIZE, dtype=torch.int64),
            r"images: expected uint8 or a floating-point dtype, got torch\.int64",
        ),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.int8), "images: expected uint8 or .* got torch.int8"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.bool), "images: expected uint8 or .* got torch.bool"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.cfloat), "images: expected uint8 or .* got torch.complex64"),
        (torch.zeros(3, SIZE, SIZE + 1), r"images: expected shape \[B, 3, 32, 32\], got \[3, 32, 33\]"),
        (
            torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8),
            r"images: expected shape \[B, 3, 32, 32\], got \[1, 32, 32, 3\]",
        ),
        (torch.zeros(1, 1, 3, SIZE, SIZE), r"images: expected shape \[B, 3, 32, 32\], got \[1, 1, 3, 32, 32\]"),
        (torch.zeros(()), r"images: expected shape \[B, 3, 32, 32\], got \[\]"),
        (torch.zeros(1, 3, SIZE, SIZE, device="meta"), "images: expected a dense tensor with data"),
        (torch.zeros(1, 3, SIZE, SIZE).to_sparse(), "images: expected a dense tensor with data, got torch.sparse_coo"),
        (LEVELS / 255, r"images\[0\]: expected a uint8 array \[H, W, 3\], got float64 \[32, 32, 3\]"),
        (LEVELS[0, ..., 0], r"images: expected a uint8 array \[H, W, 3\], got uint8 \[32, 32\]"),
        (LEVELS.transpose(0, 3, 1, 2), r"images\[0\]: expected a uint8 array \[H, W, 3\], got uint8 \[3, 32, 32\]"),
        (LEVELS[0, :0], r"images: expected a uint8 array \[H, W, 3\], got uint8 \[0, 32, 3\]"),
        (LEVELS[:0], "images: expected at least one, got none"),
        ([], "images: expected at least one, got none"),
        (
            [torch.zeros(3, SIZE, SIZE)],
            r"images\[0\]: expected a PIL image, an image file or a uint8 array .* got Tensor",
        ),
        ([LEVELS[0], None], r"images\[1\]: expected a PIL image, .* got NoneType"),
        (None, "images: expected a tensor, PIL images, .* got NoneType"),
        (b"a.jpg", "images: expected a tensor, PIL images, .* got bytes"),
        ({"a": 1}, "images: expected a tensor, PIL images, .* got dict"),
        ("no such file.jpg", "no such file.jpg: expected an image file, found nothing"),
        (Path(__file__), "test_image_batch.py: cannot read this image"),
        ([Path(__file__).parent], "expected an image file, found a folder"),
    ],
)
def test_what_is_no_image(images, message):
    with pytest.raises(InputError, match=message) as error:
        ImageBatches(SIZE)(images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "declared", [(0, 2), (1, -1), (0,), "01", None, 1, (False, True), (0, 1, 2), (0, float("nan"))]
)
def test_unknown_ranges(declared):
    with pytest.raises(InputError, match=r"image_range: expected one of \(-1, 1\), \(0, 1\), \(0, 255\), got"):
        ImageBatches(SIZE)(LEVELS, declared)


def test_the_tokenizer_takes_them_all(tokenizer, tmp_path):  # noqa: F811
    path = save_photos(tmp_path / "more", 1)[0]
    crop = center_crop(load_image(path), SIZE)
    levels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
    expected = tokenizer.model.encode_latents(tokenizer.vae.encode(levels[None] / 127.5 - 1))
    assert expected.shape == (1, 32)
    for images in (path, str(path), [path], crop, np.asarray(crop), levels, levels[None] / 127.5 - 1):
        assert torch.equal(tokenizer.encode(images), expected)
        assert torch.equal(tokenizer.model.encode_latents(tokenizer.latents(images)), expected)
        assert torch.equal(tokenizer.reconstruct(images), tokenizer.decode(expected))
    scaled = levels.double() / 255
    for method in (tokenizer.latents, tokenizer.reconstruct):
        torch.testing.assert_close(method(scaled, image_range=(0, 1)), method(crop), rtol=1e-4, atol=1e-4)
        with pytest.raises(InputError, match="images: expected values in"):
            method(levels.float())
