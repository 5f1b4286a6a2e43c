"""Images to tensors and back: exact inverses, the geometry of crops, and a one-line message for each bad file."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from revq.data.images import center_crop, decode_image, load_image, random_crop, to_pil, to_tensor
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


def png(width, height, bits, kind, rows, *chunks):
    """A PNG file of raw rows, each with its filter byte, and with chunks before them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    parts = [header, *(chunk(*part) for part in chunks), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def expect(data, values, **options):
    """The file's gray or RGB values, given as fractions of white."""
    expected = np.rint(np.asarray(values, np.float64) * 255)
    got = pixels(decode_image(data, "a file", **options))[0]
    assert np.array_equal(got, expected if expected.ndim == 2 else np.stack([expected] * 3, axis=-1)), got


def refuses(data, reason, **options):
    with pytest.raises(InputError, match=reason) as caught:
        decode_image(data, "the\nlabel", **options)
    assert str(caught.value).startswith("the\\nlabel: ")
    assert "\n" not in str(caught.value)


def test_every_depth_has_its_own_range():
    counts = np.array([0, 1, 300, 1000, 1023], np.uint16)
    shares = counts / 1023
    expect(b"P5 5 1 1023\n" + counts.astype(">u2").tobytes(), shares)
    expect(b"P2 5 1 1023\n" + b" ".join(b"%d" % count for count in counts), shares)
    expect(b"P5 # a comment\n2 1 15\n" + bytes([1, 15]), [1 / 15, 1])
    expect(b"P6 1 1 4095\n" + np.array([7, 2000, 4095], ">u2").tobytes(), np.array([[7, 2000, 4095]]) / 4095)
    expect(b"P6 1 1 65535\n" + np.array([7, 511, 65535], ">u2").tobytes(), np.array([[7, 511, 65535]]) / 65535)
    wide = np.array([[0, 128, 129, 511, 40000, 65535]], np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        expect(saved(Image.fromarray(wide), kind), wide[0] / 65535)
    floats = np.array([[0, 0.1, 0.25, 0.7, 1]], np.float32)
    expect(saved(Image.fromarray(floats), "TIFF"), floats[0].astype(np.float64))
    expect(b"Pf\n5 1\n-1.0\n" + floats.tobytes(), floats[0].astype(np.float64))
    expect(saved(Image.fromarray(wide), "TIFF", tiffinfo={262: 0}), 1 - wide[0] / 65535)  # white is zero
    expect(saved(Image.fromarray(floats), "TIFF", tiffinfo={262: 0}), 1 - floats[0].astype(np.float64))
    expect(png(4, 1, 1, 0, b"\0\x50"), [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 1, 70000]], np.int32), "no defined range"),
        (np.array([[0, 255]], np.float32), r"only in \[0, 1\], got 0..255"),
        (np.array([[-0.5, 1]], np.float32), r"only in \[0, 1\]"),
        (np.array([[0, np.nan]], np.float32), r"only in \[0, 1\]"),
        (np.array([[0, np.inf]], np.float32), r"only in \[0, 1\]"),
    ],
)
def test_values_without_a_range_are_refused(values, reason):
    refuses(saved(Image.fromarray(values), "TIFF"), reason)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 100, 200)])
def test_transparent_pixels_show_the_background(background):
    def over(color, alpha):
        return [(c * alpha + b * (255 - alpha)) / 255 / 255 for c, b in zip(color, background, strict=True)]

    colors = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    rgba, gray = Image.new("RGBA", (3, 1)), Image.new("LA", (3, 1))
    rgba.putdata([(*color, alpha) for color, alpha in zip(colors, (0, 100, 255), strict=True)])
    gray.putdata([(10, 0), (40, 100), (70, 255)])
    soft = [over(color, alpha) for color, alpha in zip(colors, (0, 100, 255), strict=True)]
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        expect(saved(rgba, kind, **options), soft, background=background)
    soft_gray = [over((level,) * 3, alpha) for level, alpha in ((10, 0), (40, 100), (70, 255))]
    expect(saved(gray, "PNG"), soft_gray, background=background)
    palette = Image.new("P", (3, 1))
    palette.putpalette([level for color in colors for level in color])
    palette.putdata([0, 1, 2])
    hard = [over(colors[0], 255), over(colors[1], 0), over(colors[2], 255)]
    expect(saved(palette, "PNG", transparency=1), hard, background=background)
    expect(saved(palette, "GIF", transparency=1), hard, background=background)
    expect(saved(palette, "PNG", transparency=bytes([0, 100, 255])), soft, background=background)
    for bits, row, key, shares in (
        (1, b"\0\x40", 1, [0, None]),
        (2, b"\0\x60", 2, [1 / 3, None]),
        (4, b"\0\x3a", 10, [3 / 15, None]),
        (8, b"\0\x03\x0a", 10, [3 / 255, None]),
        (16, b"\0\x01\x00\x01\x01", 257, [256 / 65535, None]),
    ):
        expected = [over((0,) * 3, 0) if share is None else [share] * 3 for share in shares]
        data = png(2, 1, bits, 0, row, (b"tRNS", struct.pack(">H", key)))
        expect(data, expected, background=background)
    data = png(2, 1, 8, 2, b"\0\1\2\3\1\2\4", (b"tRNS", struct.pack(">3H", 1, 2, 3)))
    expect(data, [over((0,) * 3, 0), over((1, 2, 4), 255)], background=background)


def test_color_spaces():
    cmyk = Image.new("CMYK", (2, 1))
    cmyk.putdata([(255, 51, 0, 102), (0, 0, 0, 0)])
    expect(saved(cmyk, "TIFF"), [[0, 0.8 * 0.6, 0.6], [1, 1, 1]])
    inverted = saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)  # as Adobe writes it
    np.testing.assert_allclose(pixels(decode_image(inverted, "x"))[0, 0], [0, 255, 255], atol=2)
    lab = Image.new("LAB", (3, 1))
    lab.putdata([(255, 128, 128), (136, 128, 128), (0, 128, 128)])  # lightness 100, 53.3 and 0; no color
    lightness = 136 / 255 * 100
    linear = ((lightness + 16) / 116) ** 3
    middle = (1.055 * linear ** (1 / 2.4) - 0.055) * 255
    got = pixels(decode_image(saved(lab, "TIFF"), "x"))[0]
    np.testing.assert_allclose(got, [[255] * 3, [middle] * 3, [0] * 3], atol=1.5)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(pixels(decode_image(data, kind))[0, 0], [255, 0, 0], atol=2)


def exif(*entries, data=b""):
    """An EXIF block; an entry is (tag, type, count, four bytes), and ``data`` starts at 14 + 12 per entry."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + data


TURN = (0x112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (exif(TURN, (0x11A, 5, 1, struct.pack("<I", 38)), data=struct.pack("<II", 72, 0)), True),
        (exif(TURN, (0x11A, 10, 1, struct.pack("<I", 38)), data=struct.pack("<ii", -72, -1)), True),
        (exif(TURN, (0x128, 4, 1, struct.pack("<I", 70000))), True),
        (exif((0x100, 2, 4, b"abc\0"), TURN), True),
        (exif((0x112, 3, 1, b"\x63\0\0\0")), False),
        (exif((0x112, 2, 2, b"6\0\0\0")), False),
        (exif((0x112, 5, 1, struct.pack("<I", 26)), data=struct.pack("<II", 6, 0)), False),
        (exif((0x112, 3, 0xFFFFFFFF, b"\6\0\0\0")), False),
        (exif((0x8769, 4, 1, struct.pack("<I", 8))), False),
        (b"Exif\0\0no TIFF at all", False),
    ],
)
def test_odd_exif_does_not_reject_pixels(block, turned):
    image = gradient(6, 4)
    right = pixels(image.transpose(Image.Transpose.ROTATE_270) if turned else image)
    assert np.array_equal(pixels(decode_image(saved(image, "PNG", exif=block), "x")), right)
    for kind in ("JPEG", "WEBP"):
        assert decode_image(saved(image, kind, exif=block), "x").size == right.shape[1::-1]


def test_large_images_are_refused_by_their_header():
    refuses(png(13300, 13300, 1, 0, b""), "13300 x 13300 pixels: more than max_pixels")
    refuses(png(1, 1 << 26, 1, 0, b""), "more than max_pixels")
    refuses(png(40000, 40000, 1, 0, b""), "exceeds limit")
    refuses(saved(gradient(100, 100), "PNG"), "100 x 100 pixels: more than max_pixels=9999", max_pixels=9999)
    assert decode_image(saved(gradient(100, 100), "PNG"), "x", max_pixels=10000).size == (100, 100)
    refuses(saved(gradient(4, 4), "PNG"), "max_pixels", max_pixels=1)
    for options in ({"background": (0, 0, 256)}, {"background": (0.5, 0, 0)}, {"max_pixels": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            decode_image(saved(gradient(4, 4), "PNG"), "x", **options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA", "QOI"])
def test_truncated_files_are_refused(kind, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # as another library may have set it
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    for share in (0.4, 0.9):
        refuses(whole[: int(len(whole) * share)], "truncated")


def test_a_file_that_could_block_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere")
    for path, found in (
        (tmp_path / "a.png", "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path / "b.png", "a broken link"),
        ("a\0b", "null"),
        ("x" * 5000, "too long"),
    ):
        with pytest.raises(InputError, match=found):
            load_image(path)


def test_a_thin_image_is_cropped_before_it_is_scaled():
    for width, height in ((1, 30_000), (1 << 20, 1), (3, 100_000)):
        y, x = np.divmod(np.arange(width * height, dtype=np.int64), width)
        middle = (np.abs(x - width // 2) < 1000) & (np.abs(y - height // 2) < 1000)
        image = Image.fromarray(np.where(middle, 200, 10).astype(np.uint8).reshape(height, width)).convert("RGB")
        assert np.unique(pixels(center_crop(image, 64))).tolist() == [200]
        assert random_crop(image, 64, random.Random(0)).size == (64, 64)
    ramp = np.random.default_rng(0).integers(0, 256, (40, 900, 3), dtype=np.uint8)
    thin, ordinary = center_crop(Image.fromarray(ramp), 20), Image.fromarray(ramp[:, 150:750])
    assert np.abs(pixels(thin) - pixels(center_crop(ordinary, 20))).max() <= 1


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
