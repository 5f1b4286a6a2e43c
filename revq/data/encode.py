"""A folder of images -> a store of latents, once per data set (paper, Appendix F.1)."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

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

    Which crops are taken depends on ``seed`` alone.  Killed and called again with the same arguments, it keeps the shards
    that were finished, and the store comes out the same, byte for byte.  Called again after its end, it returns the store.

    Args:
        images: a folder (its images in sorted order) or a list of files.
        vae: the encoder.
        image_size: side of a crop in pixels.
        out: folder of the new store.
        crops: random crops per image; 0 takes one center crop of each.
        seed: of the random crops.
        batch_size: crops per call of the encoder.
        dtype: how the latents are stored.
        min_scale: a random crop's side is at least this share of the image's short side.
        shard_bytes: about how large a file of the store is.
        progress: show a bar.

    Raises:
        InputError: for a missing or damaged image, an empty folder, or an ``out`` that holds something already.
    """
    from revq.data.images import list_images, to_tensor

    if image_size < 1 or batch_size < 1:
        raise InputError(f"image_size and batch_size: expected numbers >= 1, got {image_size} and {batch_size}")
    folder = Path(images) if isinstance(images, str | Path) else None
    paths = list_images(folder) if folder else [Path(path) for path in images]
    plan = StorePlan(
        vae=vae.name,
        vae_fingerprint=vae.fingerprint,
        latent_shape=vae.latent_shape(image_size),
        image_size=image_size,
        sources=tuple(path.relative_to(folder).as_posix() if folder else path.name for path in paths),
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
                bar.update(rows.start - bar.n)  # what an earlier call has done
                parts = []
                for start in range(rows.start, rows.stop, batch_size):  # a batch never crosses shards: its last bits
                    batch = [reader.crop(row) for row in range(start, min(start + batch_size, rows.stop))]
                    parts.append(
                        vae.encode(to_tensor(batch)).cpu()
                    )  # depend on its company, and a resumed run keeps it
                    bar.update(len(batch))
                writer.write(number, torch.cat(parts))
            bar.update(plan.rows - bar.n)
        return writer.finish()
    except InputError:
        writer.abandon()
        raise


def _inputs(paths: Sequence[Path], min_scale: float, batch_size: int) -> str:
    """Tells other files of the same names apart without reading them all; a missing one is told when it is read."""
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    return hashlib.sha256(json.dumps([min_scale, batch_size, sizes]).encode()).hexdigest()


class _CropReader:
    """Makes the crop of a row; keeps the image that it read last, as an image's crops follow one another."""

    def __init__(self, paths: Sequence[Path], plan: StorePlan, min_scale: float) -> None:
        self._paths, self._plan, self._min_scale = paths, plan, min_scale
        self._number, self._image = -1, None

    def crop(self, row: int) -> "Image":
        from revq.data.images import center_crop, load_image, random_crop

        number, crop = divmod(row, max(1, self._plan.crops))
        if number != self._number:
            self._number, self._image = number, load_image(self._paths[number])
        if self._plan.crops == 0:
            return center_crop(self._image, self._plan.image_size)
        rng = random.Random(f"{self._plan.seed}/{number}/{crop}")
        return random_crop(self._image, self._plan.image_size, rng, self._min_scale)
