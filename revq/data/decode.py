"""Image files to RGB pixels by documented rules for value ranges, transparency, orientation and size; with PIL alone."""

import math
import os
import re
import stat
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from revq.data.foreign import Failure, attempt
from revq.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

WHITE = (255, 255, 255)
MAX_PIXELS = 100 << 20
"""Larger images are refused before their pixels are decoded; a decoded pixel takes 4 to 8 bytes."""

_REFUSED_FORMATS = frozenset(
    {"EPS", "PDF", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "FITS", "IPTC", "MCIDAS", "SPIDER", "PALM"}
)
"""Formats that Pillow names, but that run other programs, hold no pixels, or hold measurements without a range."""

_STRIP_PIXELS = 1 << 20
_ROW_PIXELS = 64
"""What Pillow needs for a row of any width, counted in pixels: memory for a pointer, time for a call."""
_ORIENTATION = 0x0112


def image_formats() -> list[str]:
    """Names of the formats that the installed Pillow, with its plugins, decodes and that `load_image` reads."""
    from PIL import Image

    Image.init()
    return sorted(set(Image.OPEN) - _REFUSED_FORMATS)


def image_suffixes() -> tuple[frozenset[str], frozenset[str]]:
    """The lower-case suffixes of the formats that `load_image` reads, and those of Pillow's formats that it does not."""
    from PIL import Image

    read = {*image_formats(), "MPO"}  # Pillow opens MPO as JPEG
    known = Image.registered_extensions()
    good = frozenset(suffix.lower() for suffix, name in known.items() if name in read)
    return good, frozenset(suffix.lower() for suffix in known) - good


def load_image(path: str | Path, *, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS) -> "Image":
    """Read an image file as RGB; of an animation or a file of several pictures, the first.

    * Values: 8 bits per channel as they are; 16 bits (and what PNM and TIFF declare as 10 or 12 bits) scaled from their
      full range; floats in [0, 1].  Other floats and 32-bit integers have no defined range and are refused.
    * Transparent pixels are composited on ``background``.
    * Rotated by the EXIF orientation; EXIF data that cannot be read is ignored.
    * Color profiles are ignored: the stored numbers are taken as sRGB, CMYK is converted by (1 - C)(1 - K).

    Args:
        path: a regular file.
        background: red, green and blue in 0..255.
        max_pixels: larger images are refused from their header alone; a row counts as 64 pixels at least.  Above 178,956,970, raise
            ``PIL.Image.MAX_IMAGE_PIXELS`` as well.

    Raises:
        InputError: if the file is missing, is not an image, is damaged, truncated or too large, or its values have no
            defined range.
    """
    return decode_image(read_file(Path(path), max_pixels), str(path), background=background, max_pixels=max_pixels)


def decode_image(
    data: bytes, label: str, *, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS
) -> "Image":
    """The image that ``data``, the bytes of an image file, holds; rules and errors as for `load_image`.

    Args:
        label: the name of the file, for errors.
    """
    if len(background) != 3 or not all(isinstance(level, int) and 0 <= level <= 255 for level in background):
        raise InputError(f"background: expected three integers in 0..255, got {background!r}")
    if max_pixels < 1:
        raise InputError(f"max_pixels: expected at least 1, got {max_pixels}")
    if not data:
        raise InputError(f"{printable(label)}: cannot read this image (not an image: the file is empty)")
    outcome = attempt(lambda: _decode(data, background, max_pixels))
    if isinstance(outcome, Failure):
        # Damaged metadata of a JPEG can stop Pillow before the pixels, which do not depend on it.
        bare = _without_exif(data)
        again = outcome if bare is None else attempt(lambda: _decode(bare, background, max_pixels))
        if isinstance(again, Failure):
            raise InputError(
                f"{printable(label)}: cannot read this image ({_reason(outcome.error)})"
            ) from outcome.error
        outcome = again
    return outcome


def to_rgb(image: "Image", label: str, *, background: tuple[int, int, int] = WHITE) -> "Image":
    """A PIL image as RGB, by the rules of `load_image` for values and transparency; it is not rotated.

    Raises:
        InputError: if its file is damaged, it has no pixels, or its values have no defined range.
    """

    def convert() -> "Image":
        _check_pixels(image, MAX_PIXELS)
        coding = _coding(image)
        image.load()
        return _rgb(image, coding, background)

    outcome = attempt(convert)
    if isinstance(outcome, Failure):
        raise InputError(f"{label}: cannot read this image ({_reason(outcome.error)})") from outcome.error
    return outcome


def printable(name: str) -> str:
    """``name`` on one line of valid text: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


class _RefusedError(Exception):
    """Of this file alone: its text is the whole reason."""


def _reason(error: Exception) -> str:
    """Why Pillow cannot read an image, on one line."""
    from PIL import Image, UnidentifiedImageError

    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        text = "not an image, cut off in its header, or of a kind that Pillow does not read"
    elif not isinstance(error, _RefusedError | Image.DecompressionBombError) and "truncated" not in text.lower():
        text = f"damaged or truncated: {text or type(error).__name__}"
    return text[:300]


def read_file(path: Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of an image file, in one read.

    Raises:
        InputError: if it is missing, is no regular file, cannot be read, or is too large for ``max_pixels`` pixels.
    """
    label = printable(str(path))
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):  # a FIFO or a device could block for ever
            if status.st_size > (limit := 16 * max_pixels + (64 << 20)):
                raise InputError(f"{label}: expected at most {limit} bytes, got {status.st_size}")
            with open(
                path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
            ) as file:
                data = file.read(status.st_size + 1)
            if len(data) != status.st_size:
                raise InputError(f"{label}: expected a file that stays as it is, got another size while it was read")
            return data
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
    except (FileNotFoundError, NotADirectoryError):
        found = "a broken link" if path.is_symlink() else "nothing"
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{label}: cannot read this file ({getattr(error, 'strerror', None) or error})") from error
    raise InputError(f"{label}: expected an image file, found {found}")


def _decode(data: bytes, background: tuple[int, int, int], max_pixels: int) -> "Image":
    from PIL import Image, ImageFile

    # Another library may have set this for itself; the missing part of a picture would silently be gray.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and about sizes below max_pixels
            with Image.open(BytesIO(data), formats=image_formats()) as image:
                _check_pixels(image, max_pixels)
                # An icon's header can announce a smaller size than the picture inside has.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                coding = _coding(image)  # load() forgets it
                if image.format == "PPM" and (levels := _pnm_levels(data)) is not None:
                    return levels
                image.load()
                _check_pixels(image, max_pixels)
                return _upright(image, _rgb(image, coding, background))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _check_pixels(image: "Image", max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise _RefusedError(f"it has {width} x {height} pixels")
    if max(width, _ROW_PIXELS) * height > max_pixels:
        raise _RefusedError(f"{width} x {height} pixels: more than max_pixels={max_pixels}")


class _Coding(NamedTuple):
    """How stored values become levels: what the mode of a PIL image does not say."""

    maximum: int
    """The stored value of white, of 16-bit and 32-bit modes."""
    key_scale: int
    """Levels per step of a PNG's transparent gray, which is given in the file's bit depth."""
    inverted: bool
    """0 is white."""


def _coding(image: "Image") -> _Coding:
    tiles = getattr(image, "tile", None)
    raw = tiles[0].args if tiles else None
    raw = raw[0] if isinstance(raw, tuple) and raw else raw
    tags = getattr(image, "tag_v2", {})
    key_scale = {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17}.get(str(raw), 1)
    wide = image.mode.startswith("I") or image.mode == "F"  # of 8-bit modes, Pillow itself inverts
    return _Coding(4095 if raw == "I;12" else 65535, key_scale, wide and tags.get(262) == 0)


def _rgb(image: "Image", coding: _Coding, background: tuple[int, int, int]) -> "Image":
    """``image`` as RGB; works on a strip of rows at a time, so that no large image is held in a third form."""
    from PIL import Image

    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # Pillow scales these two to 0..65535
        raise _RefusedError("32-bit or signed integers have no defined range of values")
    if image.mode in ("RGB", "YCbCr", "CMYK", "HSV", "L", "1", "RGBX") and "transparency" not in image.info:
        return image.convert("RGB")
    width, height = image.size
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        color, opacity = _color_and_opacity(strip, coding)
        if opacity is not None and opacity.getextrema() != (255, 255):
            over = Image.new("RGB", strip.size, background)
            over.paste(color, mask=opacity)
            color = over
        result.paste(color, (0, top))
    return result


def _color_and_opacity(image: "Image", coding: _Coding) -> "tuple[Image, Image | None]":
    from PIL import Image, ImageCms

    key = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        levels = _float_levels(values) if image.mode == "F" else _integer_levels(values, coding.maximum)
        gray = Image.fromarray(255 - levels if coding.inverted else levels)
        opaque = None if not isinstance(key, int) or image.mode == "F" else _mask(values != key)
        return gray.convert("RGB"), opaque
    if image.mode in ("1", "L") and isinstance(key, int):
        return image.convert("RGB"), _mask(np.asarray(image.convert("L")) != min(255, key * coding.key_scale))
    if image.mode == "RGB" and isinstance(key, tuple):
        # A key above 255 is of a file of 16 bits, of which Pillow keeps the upper 8.
        color = np.array([level >> 8 if max(key) > 255 else level for level in key])
        return image, _mask((np.asarray(image) != color).any(axis=-1))
    if image.mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None only with inPlace
        return converted, None
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("P", "PA", "LA", "RGBa") or image.has_transparency_data:
        image = image.convert("RGBA")
    return image.convert("RGB"), image.getchannel("A") if image.mode == "RGBA" else None


def _mask(opaque: NDArray[np.bool_]) -> "Image":
    from PIL import Image

    return Image.fromarray(opaque.astype(np.uint8) * 255)


def _integer_levels(values: NDArray[np.integer], maximum: int) -> NDArray[np.uint8]:
    if values.size and (values.min() < 0 or values.max() > maximum):
        raise _RefusedError(f"values {values.min()}..{values.max()} are outside 0..{maximum}")
    return ((values.astype(np.int64) * 510 + maximum) // (2 * maximum)).astype(np.uint8)  # rounds to nearest


def _float_levels(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())  # NaN if any value is
    if not (low >= 0 and high <= 1):
        raise _RefusedError(f"floats have a defined range only in [0, 1], got {low:g}..{high:g}")
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)


def _upright(source: "Image", pixels: "Image") -> "Image":
    """``pixels`` turned by the EXIF orientation of ``source``, which is ignored if it cannot be read."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    orientation = attempt(lambda: source.getexif().get(_ORIENTATION))
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return pixels if turn is None else pixels.transpose(turn)


def _without_exif(data: bytes) -> bytes | None:
    """A JPEG without its APP1 segments (EXIF, XMP) and APP2 (MPO's index); None if there is none, or it is no JPEG."""
    if data[:2] != b"\xff\xd8":
        return None
    kept, start = [data[:2]], 2
    while data[start : start + 1] == b"\xff" and 0xC0 <= data[start + 1] <= 0xFE and data[start + 1] != 0xDA:
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if data[start + 1] not in (0xE1, 0xE2):
            kept.append(data[start:end])
        start = end
    bare = b"".join(kept) + data[start:]
    return bare if len(bare) < len(data) else None


def _pnm_levels(data: bytes) -> "Image | None":
    """A binary PGM or PPM of an unusual range, which Pillow scales value by value; None for all others."""
    from PIL import Image

    blank = rb"(?:\s|#[^\n]*\n)+"
    header = re.match(rb"P([56])" + blank + rb"(\d+)" + blank + rb"(\d+)" + blank + rb"(\d+)\s", data[:4096])
    if header is None:
        return None
    kind, width, height, maximum = map(int, header.groups())
    if maximum == 255 or not 1 <= maximum <= 65535 or (kind == 5 and maximum == 65535):
        return None
    shape = (height, width, 3) if kind == 6 else (height, width)
    dtype = np.dtype(">u2" if maximum > 255 else "u1")
    if len(data) - header.end() < math.prod(shape) * dtype.itemsize:
        raise _RefusedError("truncated: fewer values than its header says")
    values = np.frombuffer(data, dtype, math.prod(shape), header.end()).reshape(shape)
    levels = np.empty(shape, np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        levels[top : top + rows] = _integer_levels(values[top : top + rows], maximum)
    return Image.fromarray(levels).convert("RGB")
