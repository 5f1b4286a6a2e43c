"""Encodes a folder of images to a store of latents, once per data set (paper, Appendix F.1)."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from revq.data.images import center_crop, list_images, load_image, random_crop, to_tensor
from revq.data.latents import LatentStore, LatentWriter, StorePlan, is_latent_store
from revq.errors import InputError
from revq.progress import progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from revq.data.vae import FrozenVAE


def encode_folder(
    images: str | Path | Sequence[str | Path],
    vae: "FrozenVAE",
    *,
    image_size: int,
    out: str | Path,
    crops: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    min_scale: float = 0.5,
    shard_bytes: int = 8 << 20,
    progress: bool = True,
) -> LatentStore:
    """Encode crops of images with a frozen VAE.

    The crops depend on ``seed`` alone.  If the call is interrupted, a call with the same arguments keeps the finished
    shards and gives the same store, byte for byte.  A call for a store that is complete returns it.

    Args:
        images: a folder (its images in sorted order) or a list of files.
        vae: the VAE whose encoder is used.
        image_size: side of a crop in pixels.
        out: folder of the new store.
        crops: random crops per image; 0 takes one center crop of each.
        seed: seed of the random crops.
        batch_size: crops per call of the encoder.
        dtype: dtype of the stored latents.
        min_scale: a random crop's side is at least this fraction of the image's short side.
        shard_bytes: approximate size of a file of the store.
        progress: show a bar.

    Raises:
        InputError: for a missing or damaged image, an empty folder, or an ``out`` that holds other files.
    """
    if image_size < 1 or batch_size < 1:
        raise InputError(f"image_size and batch_size: expected numbers >= 1, got {image_size} and {batch_size}")
    if isinstance(images, str | Path):
        paths = list_images(images)
        names = [path.relative_to(images).as_posix() for path in paths]
    else:
        paths = [Path(path) for path in images]
        names = [path.name for path in paths]
    plan = StorePlan(
        vae=vae.name,
        vae_fingerprint=vae.fingerprint,
        latent_shape=vae.latent_shape(image_size),
        image_size=image_size,
        sources=tuple(names),
        crops=crops,
        seed=seed,
        dtype=dtype,
        inputs=_inputs(paths, min_scale, batch_size),
    )
    if is_latent_store(out) and (finished := LatentStore(out)).plan == plan:
        return finished
    writer = LatentWriter(out, plan, shard_bytes=shard_bytes)
    reader = _CropReader(paths, plan, min_scale)
    try:
        with progress_bar("encode", "crop", plan.rows, show=progress) as bar:
            for number, rows in writer.missing():
                bar.update(rows.start - bar.n)  # skip the shards of an earlier call
                parts = []
                # Results depend on batch composition in the last bits.  No batch spans two shards, so a resumed call
                # forms the same batches as an uninterrupted one.
                for start in range(rows.start, rows.stop, batch_size):
                    batch = [reader.crop(row) for row in range(start, min(start + batch_size, rows.stop))]
                    parts.append(vae.encode(to_tensor(batch)).cpu())
                    bar.update(len(batch))
                writer.write(number, torch.cat(parts))
            bar.update(plan.rows - bar.n)
        return writer.finish()
    except InputError:
        writer.abandon()
        raise


def _inputs(paths: Sequence[Path], min_scale: float, batch_size: int) -> str:
    """Hash of the inputs that `StorePlan` does not name; file sizes stand for contents, which are not read here.

    A missing file counts as size -1; it is reported on read.
    """
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    return hashlib.sha256(json.dumps([min_scale, batch_size, sizes]).encode()).hexdigest()


class _CropReader:
    """Makes the crop of a row.  The last image stays loaded, because the crops of an image have consecutive rows."""

    def __init__(self, paths: Sequence[Path], plan: StorePlan, min_scale: float) -> None:
        self._paths, self._plan, self._min_scale = paths, plan, min_scale
        self._number = -1
        self._image: Image | None = None

    def crop(self, row: int) -> "Image":
        number, crop = divmod(row, max(1, self._plan.crops))
        if self._image is None or number != self._number:
            self._number, self._image = number, load_image(self._paths[number])
        if self._plan.crops == 0:
            return center_crop(self._image, self._plan.image_size)
        rng = random.Random(f"{self._plan.seed}/{number}/{crop}")
        return random_crop(self._image, self._plan.image_size, rng, self._min_scale)
