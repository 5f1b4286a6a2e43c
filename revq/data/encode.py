"""Encodes a folder of images to a store of latents, once per data set (paper, Appendix F.1)."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from revq.data.decode import decode_image, read_file
from revq.data.images import center_crop, random_crop, to_tensor
from revq.data.latent_writer import SHARD_BYTES, KnownShard, LatentWriter, Source
from revq.data.latents import LatentStore, StorePlan
from revq.data.listing import NamedFile, image_files
from revq.errors import InputError
from revq.progress import progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image
    from tqdm import tqdm

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
    mirrored: bool = False,
    log_variances: bool = False,
    background: tuple[int, int, int] = (255, 255, 255),
    shard_bytes: int = SHARD_BYTES,
    on_error: Literal["skip", "stop"] = "skip",
    trust_mtime: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> LatentStore:
    """Encode crops of images with a frozen VAE.

    A crop depends on ``seed`` and on its image file's bytes alone.  If the call is interrupted, a call with the same
    arguments keeps the finished shards and gives the same store, byte for byte.  A later call for the same ``out`` brings
    the store up to date: shards whose images have the same names and bytes are kept, all others are encoded, and the new
    store replaces the old one in one step.

    Args:
        images: a folder, or a list of files and folders (see `image_files`).
        vae: the VAE whose encoder is used.
        image_size: side of a crop in pixels.
        out: folder of the store.
        crops: random crops per image; 0 takes one center crop of each.
        seed: seed of the random crops.
        batch_size: crops per call of the encoder.  No batch spans two shards.
        dtype: dtype of the stored latents.
        min_scale: a random crop's side is at least this fraction of the image's short side.
        mirrored: store the latents of the mirrored crops, too.
        log_variances: store the log-variances of the posterior, too; for VAEs that have one.
        background: color (red, green, blue) behind transparent pixels.
        shard_bytes: approximate size of a file of the store.
        on_error: ``skip`` leaves out an image that cannot be read and lists it in `LatentStore.skipped`; ``stop`` raises.
        trust_mtime: take a file that has the name, size and time of last change of an earlier call for the same file,
            instead of reading it again.
        overwrite: replace a store that was made with other arguments.
        progress: show a bar.

    Raises:
        InputError: for an empty folder, if no image can be read, for an ``out`` that holds other files or, without
            ``overwrite``, latents that were made with other arguments; with ``on_error="stop"``, for a damaged image.
    """
    if image_size < 1 or batch_size < 1:
        raise InputError(f"image_size and batch_size: expected numbers >= 1, got {image_size} and {batch_size}")
    if not 0 < min_scale <= 1:
        raise InputError(f"min_scale: expected a share in (0, 1], got {min_scale}")
    if on_error not in ("skip", "stop"):
        raise InputError(f"on_error: expected skip or stop, got {on_error!r}")
    files = image_files([images] if isinstance(images, str | Path) else images).files
    plan = StorePlan(
        vae=vae.name,
        vae_fingerprint=vae.fingerprint,
        latent_shape=vae.latent_shape(image_size),
        image_size=image_size,
        crops=crops,
        seed=seed,
        dtype=dtype,
        mirrored=mirrored,
        log_variances=log_variances,
        options={"batch_size": batch_size, "min_scale": min_scale, "background": list(background)},
    )
    with (
        LatentWriter(out, plan, shard_bytes=shard_bytes, overwrite=overwrite) as writer,
        progress_bar("encode", "crop", len(files) * plan.rows_per_source, show=progress) as bar,
    ):
        known = _UnchangedShards(files, writer.known, trust_mtime=trust_mtime)
        encoder = _Encoder(writer, vae, batch_size, bar)
        position = 0
        while position < len(files):
            if (shard := known.starting_at(position)) is not None:
                encoder.close_shard()
                writer.keep(shard)
                bar.update(shard.length * plan.rows_per_source)
                position += shard.length
                continue
            file = files[position]
            source = Source(file.name)
            try:
                data, source = _read(file)
                image = decode_image(data, str(file.path), background=background)
            except InputError as error:
                if on_error == "stop":
                    raise
                encoder.skip(source, str(error).removeprefix(f"{file.path}: "))
            else:
                encoder.add(source, _crops(image, plan, source, min_scale))
            position += 1
        encoder.close_shard()
        return writer.finish()


class _Encoder:
    """Collects crops to batches for the VAE and passes the latents on to the writer."""

    def __init__(self, writer: LatentWriter, vae: "FrozenVAE", batch_size: int, bar: "tqdm[Any]") -> None:
        self._writer, self._vae, self._batch_size, self._bar = writer, vae, batch_size, bar
        self._pending: list[Image] = []

    def add(self, source: Source, crops: "Iterator[Image]") -> None:
        if self._writer.shard_is_full:
            self.close_shard()
        self._writer.add(source)
        for crop in crops:
            self._pending.append(crop)
            if len(self._pending) == self._batch_size:
                self._encode()

    def skip(self, source: Source, reason: str) -> None:
        self._writer.skip(source, reason)
        self._bar.update(self._writer.plan.rows_per_source)

    def close_shard(self) -> None:
        # Results depend on batch composition in the last bits.  No batch spans two shards, so a resumed call forms the
        # same batches as an uninterrupted one.
        self._encode()
        self._writer.close_shard()

    def _encode(self) -> None:
        if not self._pending:
            return
        plan, pixels, extra = self._writer.plan, to_tensor(self._pending), {}
        if plan.log_variances:
            latents, extra["log_variances"] = self._vae.encode_posterior(pixels)
        else:
            latents = self._vae.encode(pixels)
        if plan.mirrored:
            extra["mirrored"] = self._vae.encode(pixels.flip(-1))
        self._writer.append(latents.cpu(), **extra)
        self._bar.update(len(self._pending))
        self._pending.clear()


class _UnchangedShards:
    """Finds the finished shards whose images are the next ones in the list, with the same bytes."""

    def __init__(self, files: Sequence[NamedFile], shards: Sequence[KnownShard], *, trust_mtime: bool) -> None:
        self._files, self._trust_mtime = files, trust_mtime
        self._by_name: dict[str, list[KnownShard]] = {}
        for shard in shards:
            self._by_name.setdefault(shard.first, []).append(shard)

    def starting_at(self, position: int) -> KnownShard | None:
        """The longest finished shard whose images are the files from ``position`` on; None if there is none."""
        shards = self._by_name.get(self._files[position].name, [])
        for shard in sorted(shards, key=lambda shard: -shard.length):
            files = self._files[position : position + shard.length]
            if len(files) == shard.length and all(
                self._is_unchanged(file, image) for file, (image, _) in zip(files, shard.images(), strict=True)
            ):
                return shard
        return None

    def _is_unchanged(self, file: NamedFile, image: Source) -> bool:
        if file.name != image.name:
            return False
        try:
            if self._trust_mtime:
                status = file.path.stat()
                return (status.st_size, status.st_mtime_ns) == (image.size, image.time)
            return _read(file)[1].sha256 == image.sha256
        except (InputError, OSError):  # a file that cannot be read still cannot be read
            return image.sha256 == Source("").sha256


def _read(file: NamedFile) -> tuple[bytes, Source]:
    """A file's bytes and what identifies them.

    Raises:
        InputError: if the file cannot be read.
    """
    data = read_file(file.path)
    time = file.path.stat().st_mtime_ns
    return data, Source(file.name, hashlib.sha256(data).digest(), len(data), time)


def _crops(image: "Image", plan: StorePlan, source: Source, min_scale: float) -> "Iterator[Image]":
    """The crops of an image; the random ones depend on the seed and on the bytes of its file."""
    if plan.crops == 0:
        yield center_crop(image, plan.image_size)
    for crop in range(plan.crops):
        rng = random.Random(f"{plan.seed}/{source.sha256.hex()}/{crop}")
        yield random_crop(image, plan.image_size, rng, min_scale)
