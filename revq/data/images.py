"""Crops of RGB images, and images to float tensors in [-1, 1] and back; with PIL alone, without torchvision."""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from revq.data.decode import decode_image, image_suffixes, load_image
from revq.data.listing import ImageListing, NamedFile, SkippedFile, image_files, list_images, summarize
from revq.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


__all__ = [
    "ImageListing",
    "NamedFile",
    "SkippedFile",
    "center_crop",
    "decode_image",
    "image_files",
    "image_suffixes",
    "list_images",
    "load_image",
    "random_crop",
    "summarize",
    "to_pil",
    "to_tensor",
]

_LONGEST = 16
"""Longer images, in units of their short side, are cropped before they are scaled: scaled whole, they would be huge."""
_LONGEST_BOX = 1 << 15
"""Pillow keeps the corners of a box as float32, which places them well only up to about this many pixels."""


def center_crop(image: "Image", size: int) -> "Image":
    """Scale the short side to ``size`` (bilinear, antialiased), then crop the central ``size`` x ``size`` square.

    Rounds as torchvision's Resize and CenterCrop do, because the paper's released latents were made with those.
    """
    from PIL.Image import Resampling

    _check_size(size)
    width, height = image.size
    short = min(width, height)
    if max(width, height) > _LONGEST * short:
        left, top = (width - short) / 2, (height - short) / 2
        return _resized_box(image, size, (left, top, left + short, top + short))
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
    from PIL.Image import Transpose

    _check_size(size)
    if not 0 < min_scale <= 1:
        raise InputError(f"min_scale: expected a share in (0, 1], got {min_scale}")
    width, height = image.size
    side = min(width, height) * (min_scale + (1 - min_scale) * rng.random())
    left, top = (width - side) * rng.random(), (height - side) * rng.random()
    box = (left, top, min(left + side, width), min(top + side, height))  # min: the sum may round past the edge
    # resize(box=...) reads the crop only, which is much faster than an antialiased resize of a tensor.
    crop = _resized_box(image, size, box)
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


def _resized_box(image: "Image", size: int, box: tuple[float, float, float, float]) -> "Image":
    from PIL.Image import Resampling

    if max(image.size) > _LONGEST_BOX:
        margin = math.ceil((box[2] - box[0]) / size) + 2  # at least the reach of the filter
        left, top = max(0, math.floor(box[0]) - margin), max(0, math.floor(box[1]) - margin)
        right, bottom = (min(math.ceil(end) + margin, whole) for end, whole in zip(box[2:], image.size, strict=True))
        image = image.crop((left, top, right, bottom))
        box = (box[0] - left, box[1] - top, min(box[2] - left, image.width), min(box[3] - top, image.height))
    return image.resize((size, size), Resampling.BILINEAR, box=box)


def _check_size(size: int) -> None:
    if size < 1:
        raise InputError(f"size: expected at least 1 pixel, got {size}")
