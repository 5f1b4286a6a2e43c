"""Image files to float tensors in [-1, 1] and back, and the crops; with PIL alone, without torchvision."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revq.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def load_image(path: str | Path) -> "Image":
    """Read an image file as RGB, rotated by its EXIF orientation; of an animation, the first frame.

    Raises:
        InputError: if the file is missing, is not an image, or is damaged.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected an image file, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    # PIL's decoders raise many types for damaged files: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise InputError(f"{path}: cannot read this image ({reason or type(error).__name__})") from error


def list_images(folder: str | Path) -> list[Path]:
    """All files under ``folder`` and its subfolders with an image's suffix, sorted by path; hidden files are skipped.

    Raises:
        InputError: if the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of images, found {'a file' if folder.is_file() else 'nothing'}")
    paths = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not paths:
        raise InputError(f"{folder}: expected at least one image ({' '.join(sorted(SUFFIXES))}), found none")
    return sorted(paths, key=lambda path: path.relative_to(folder).parts)


class NamedFile(NamedTuple):
    """An image file, and its name as a path relative to the folder that was given."""

    name: str
    path: Path


class ImageListing(NamedTuple):
    """The images that were found, and the files that were left out."""

    files: list[NamedFile]
    skipped: list[tuple[str, str]]


def decode_image(data: bytes, label: str, *, background: tuple[int, int, int] = (255, 255, 255)) -> "Image":
    """An image from the bytes of its file."""
    import io

    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise InputError(f"{label}: cannot read this image ({error})") from error


def image_files(places: Sequence[str | Path]) -> ImageListing:
    """The images of ``places``: files as they are, folders as `list_images` lists them.

    Raises:
        InputError: if nothing is given, a place is missing, or a folder holds no image.
    """
    files: list[NamedFile] = []
    for place in map(Path, places):
        found = [place] if place.is_file() else list_images(place)
        files += [NamedFile(path.name if path == place else path.relative_to(place).as_posix(), path) for path in found]
    if not files:
        raise InputError("images: expected at least one file or folder, got none")
    return ImageListing(files, [])


def center_crop(image: "Image", size: int) -> "Image":
    """Scale the short side to ``size`` (bilinear, antialiased), then crop the central ``size`` x ``size`` square.

    Rounds as torchvision's Resize and CenterCrop do, because the paper's released latents were made with those.
    """
    from PIL.Image import Resampling

    _check_size(size)
    width, height = image.size
    short = min(width, height)
    scaled = (int(size * width / short), int(size * height / short))
    image = image.resize(scaled, Resampling.BILINEAR)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_crop(image: "Image", size: int, rng: random.Random, min_scale: float = 0.5) -> "Image":
    """A random square of the image, scaled to ``size`` x ``size`` (bilinear, antialiased), mirrored with probability 1/2.

    Args:
        rng: the only source of randomness; every call draws four numbers from it.
        min_scale: the square's side is uniform between this fraction of the image's short side and the whole short side.

    Raises:
        InputError: if ``size`` is below 1 or ``min_scale`` not in (0, 1].
    """
    from PIL.Image import Resampling, Transpose

    _check_size(size)
    if not 0 < min_scale <= 1:
        raise InputError(f"min_scale: expected a share in (0, 1], got {min_scale}")
    width, height = image.size
    side = min(width, height) * (min_scale + (1 - min_scale) * rng.random())
    left, top = (width - side) * rng.random(), (height - side) * rng.random()
    box = (left, top, min(left + side, width), min(top + side, height))  # min: the sum may round past the edge
    # resize(box=...) reads the crop only, which is much faster than an antialiased resize of a tensor.
    crop = image.resize((size, size), Resampling.BILINEAR, box=box)
    return crop.transpose(Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def to_tensor(images: Sequence["Image"]) -> Tensor:
    """RGB images of one size -> float32 ``[B, 3, H, W]`` in [-1, 1].

    Raises:
        InputError: if there is no image, or the sizes differ.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise InputError(f"images: expected at least one, all of one size, got sizes {sizes}")
    pixels = np.stack([np.array(image.convert("RGB")) for image in images])  # uint8 [B, H, W, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_pil(images: Tensor) -> list["Image"]:
    """float ``[B, 3, H, W]`` in [-1, 1] -> RGB images; clamps, and rounds to the nearest of 256 levels.

    The exact inverse of `to_tensor`.

    Raises:
        InputError: for another shape or dtype.
    """
    from PIL import Image

    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(f"images: expected float [B, 3, H, W], got {images.dtype} {tuple(images.shape)}")
    pixels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit gray, whose values PIL's own conversion to RGB clips at 255
        levels = np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255).round().astype(np.uint8)
        image = Image.fromarray(levels)
    return image.convert("RGB")


def _check_size(size: int) -> None:
    if size < 1:
        raise InputError(f"size: expected at least 1 pixel, got {size}")
