"""What people have as images (tensors, arrays, PIL images, files) to the batch that a VAE reads, by documented rules."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from revq.data.decode import load_image, to_rgb
from revq.data.images import center_crop, to_tensor
from revq.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    OneImage = Image | str | Path | NDArray[np.uint8]
    Images = Tensor | OneImage | Sequence[OneImage]

ImageRange = tuple[float, float]
"""Black and white of float tensors: one of `IMAGE_RANGES`."""
IMAGE_RANGES: tuple[ImageRange, ...] = ((-1, 1), (0, 1), (0, 255))


class ImageBatches:
    """Makes batches of square images, float32 ``[B, 3, size, size]`` in [-1, 1].

    * A tensor ``[B, 3, size, size]`` or ``[3, size, size]`` is not resized.  uint8 is x / 127.5 - 1.  Floats must lie in the
      declared range; the host waits for their least and greatest value.  Other dtypes are refused.
    * A PIL image, an image file or a uint8 array ``[H, W, 3]`` of any size is center-cropped.  Files follow
      `load_image`, and so do values and transparency of PIL images; their EXIF orientation is not applied.
    * A list may mix these; an array ``[N, H, W, 3]`` is N images.  One image is a batch of one.

    Floats within [0, 1] that are read as another range are probably a mistake: a warning says so.

    Args:
        size: side of the images, in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, images: "Images", image_range: ImageRange = (-1, 1)) -> Tensor:
        """The batch.

        Args:
            image_range: black and white of a float tensor, (-1, 1), (0, 1) or (0, 255); of no effect on other images.

        Raises:
            InputError: for another shape, dtype, type or range, values outside ``image_range``, NaN or infinity among
                them, an image file that cannot be read, or no image.
        """
        declared = _declared(image_range)
        if isinstance(images, Tensor):
            return self._tensor(images, declared)
        return to_tensor([center_crop(image, self.size) for image in _rgb_images(images)])

    def _tensor(self, images: Tensor, declared: ImageRange) -> Tensor:
        shape, expected = tuple(images.shape), (3, self.size, self.size)
        if images.layout != torch.strided or images.is_nested or images.is_meta:
            raise InputError(f"images: expected a dense tensor with data, got {images.layout} on {images.device}")
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise InputError(f"images: expected uint8 or a floating-point dtype, got {images.dtype}")
        if images.dim() not in (3, 4) or shape[-3:] != expected:
            raise InputError(f"images: expected shape [B, {', '.join(map(str, expected))}], got {list(shape)}")
        floats = images.detach().float().reshape(-1, *expected).contiguous()
        if images.dtype == torch.uint8:
            return floats / 127.5 - 1
        if floats.numel():
            self._check_range(floats, declared)
        if declared == (0, 1):
            return floats * 2 - 1
        return floats / 127.5 - 1 if declared == (0, 255) else floats

    def _check_range(self, images: Tensor, declared: ImageRange) -> None:
        low, high = torch.stack(torch.aminmax(images)).tolist()  # one wait; NaN if any value is
        if not (declared[0] <= low and high <= declared[1]):
            found = "NaN" if low != low else f"{low:.7g} to {high:.7g}"
            others = " or ".join(f"image_range={known}" for known in IMAGE_RANGES if known != declared)
            raise InputError(
                f"images: expected values in {list(declared)}, got {found}; to declare another range, pass {others}"
            )
        unit = low >= 0 and high <= 1
        if unit and declared != (0, 1):
            warnings.warn(
                f"images: all values are in [0, 1] ({low:.4g} to {high:.4g}) and are read as {list(declared)}; "
                "if 0 is black and 1 is white, pass image_range=(0, 1)",
                UserWarning,
                stacklevel=6,  # of whoever calls `Tokenizer.encode`
            )


def _declared(image_range: object) -> ImageRange:
    if isinstance(image_range, tuple | list):
        for known in IMAGE_RANGES:
            if tuple(image_range) == known and not any(isinstance(end, bool) for end in image_range):
                return known
    raise InputError(f"image_range: expected one of {', '.join(map(str, IMAGE_RANGES))}, got {str(image_range)[:60]}")


def _rgb_images(images: object) -> "list[Image]":
    from PIL.Image import Image

    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    elif isinstance(images, Image | str | Path | np.ndarray):
        return [_rgb_image(images, "images")]
    if not isinstance(images, Sequence) or isinstance(images, bytes | bytearray | memoryview):
        raise InputError(
            "images: expected a tensor, PIL images, image files or uint8 arrays, one or a list of them, "
            f"got {type(images).__name__}"
        )
    if not images:
        raise InputError("images: expected at least one, got none")
    return [_rgb_image(image, f"images[{number}]") for number, image in enumerate(images)]


def _rgb_image(image: object, name: str) -> "Image":
    from PIL import Image

    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image, name)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"{name}: expected a PIL image, an image file or a uint8 array [H, W, 3], got {type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"{name}: expected a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
    return Image.fromarray(np.ascontiguousarray(image))
