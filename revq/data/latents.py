"""The latent store: the latents of a data set on disk, so that the VAE encodes each image once.

A store is a folder of ``latents-00000.safetensors, ...`` (one tensor ``latents`` ``[rows, C, h, w]`` each) and an
``index.json`` that names the VAE, the images and the crops.  Rows are read through a memory map, so a store may be
larger than the memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from revq.data.atomic import atomic_file
from revq.errors import InputError

FORMAT = "revq-latents-1"
_DTYPES = {"float32": ("F32", torch.float32), "float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16)}
_PLAN_FIELDS = ("vae", "vae_fingerprint", "latent_shape", "image_size", "sources", "crops", "seed", "dtype", "inputs")


@dataclass(frozen=True)
class StorePlan:
    """Description of a store, complete before its first row is written.

    Row r holds crop r mod c of image r // c, where c = max(1, crops).
    """

    vae: str
    """Name of the VAE, see `FrozenVAE.name`."""
    vae_fingerprint: str
    """See `FrozenVAE.fingerprint`."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of one latent."""
    image_size: int
    """Side of a crop, in pixels."""
    sources: tuple[str, ...]
    """Names of the images, as paths relative to the folder they came from."""
    crops: int = 0
    """Random crops per image; 0 means one center crop."""
    seed: int = 0
    """Seed of the random crops."""
    dtype: str = "float32"
    """dtype of the stored latents."""
    inputs: str = ""
    """SHA-256 of the other inputs of the latents: the sizes of the image files and the encoder's options."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.dtype not in _DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.crops < 0:
            raise InputError(f"crops: expected a number >= 0, got {self.crops}")
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise InputError(f"latent_shape: expected three positive numbers (C, h, w), got {self.latent_shape}")
        if not self.sources:
            raise InputError("sources: expected at least one image, got none")

    @property
    def rows(self) -> int:
        """Latents in the whole store."""
        return len(self.sources) * max(1, self.crops)


class LatentWriter:
    """Writes a store shard by shard into ``<folder>.partial``, which is renamed to ``<folder>`` when it is complete.

    A writer with the same plan keeps the shards that an interrupted writer finished; with another plan it deletes them.

    Args:
        folder: folder of the new store; must not exist yet, or be empty.
        plan: description of the store.
        shard_bytes: approximate size of a shard.

    Raises:
        InputError: if ``folder`` holds files, or ``<folder>.partial`` was not made by a writer.
    """

    def __init__(self, folder: str | Path, plan: StorePlan, *, shard_bytes: int = 8 << 20) -> None:
        self.folder, self.plan = Path(folder), plan
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder}: expected a new or empty folder to write latents into, it exists already")
        self._partial = self.folder.with_name(self.folder.name + ".partial")
        row_bytes = int(np.prod(plan.latent_shape)) * _DTYPES[plan.dtype][1].itemsize
        self._shard_rows = max(1, shard_bytes // row_bytes)
        self._hashes: dict[int, str] = {}
        self._open_partial()

    def _open_partial(self) -> None:
        """Create ``<folder>.partial``, or keep the finished shards of an interrupted writer with the same plan."""
        plan = {**asdict(self.plan), "shard_rows": self._shard_rows}
        known = self._partial / "plan.json"
        if self._partial.exists():
            if not known.is_file():
                raise InputError(
                    f"{self._partial}: expected the unfinished latents of an earlier run, got something else"
                )
            if known.read_text() == json.dumps(plan):
                for number in range(self.num_shards):
                    path = self._partial / shard_name(number)
                    if path.is_file():  # complete: a shard gets this name only when it is whole
                        self._hashes[number] = _sha256(path)
                return
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        with atomic_file(known) as path:
            path.write_text(json.dumps(plan))

    @property
    def num_shards(self) -> int:
        """Shards of the complete store."""
        return -(-self.plan.rows // self._shard_rows)

    def missing(self) -> Iterator[tuple[int, range]]:
        """The shards that are not written yet: number and rows."""
        for number in range(self.num_shards):
            if number not in self._hashes:
                start = number * self._shard_rows
                yield number, range(start, min(start + self._shard_rows, self.plan.rows))

    def write(self, number: int, latents: Tensor) -> None:
        """Write the rows of one shard: ``latents`` float ``[rows, C, h, w]``.

        Raises:
            InputError: if a value does not fit the store's dtype or is not finite.
        """
        stored = latents.detach().to("cpu", _DTYPES[self.plan.dtype][1]).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise InputError(f"latents: expected finite numbers within {self.plan.dtype}'s range, got others")
        target = self._partial / shard_name(number)
        with atomic_file(target) as path:
            save_file({"latents": stored}, path)
            self._hashes[number] = _sha256(path)

    def finish(self) -> "LatentStore":
        """Rename the complete store to its final name and open it."""
        missing = [number for number, _ in self.missing()]
        if missing:
            raise RuntimeError(f"shards {missing} are not written yet")
        shards = [
            {
                "file": shard_name(number),
                "rows": min(self._shard_rows, self.plan.rows - number * self._shard_rows),
                "sha256": self._hashes[number],
            }
            for number in range(self.num_shards)
        ]
        with atomic_file(self._partial / "index.json") as path:
            path.write_text(json.dumps({"format": FORMAT, **asdict(self.plan), "shards": shards}, indent=1))
        (self._partial / "plan.json").unlink()
        os.replace(self._partial, self.folder)  # noqa: PTH105
        return LatentStore(self.folder)

    def abandon(self) -> None:
        """After an error: remove ``<folder>.partial`` unless it holds a finished shard."""
        if not self._hashes:
            shutil.rmtree(self._partial, ignore_errors=True)


class LatentStore:
    """A folder of latents, open for reading.

    Attributes:
        plan: description of the store.
        shape: (C, h, w) of one latent.
        fingerprint: SHA-256 of the index, which holds the SHA-256 of every shard; equal fingerprints mean equal latents.

    Raises:
        InputError: if the folder or one of its files is missing, damaged or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        text, index = _read_index(self.folder)
        self.fingerprint = hashlib.sha256(text).hexdigest()
        try:
            self.plan = StorePlan(**{name: index[name] for name in _PLAN_FIELDS})
            shards = [(self.folder / shard["file"], int(shard["rows"])) for shard in index["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / 'index.json'}: not a valid latent index: {error}") from None
        if sum(rows for _, rows in shards) != self.plan.rows:
            raise InputError(f"{self.folder / 'index.json'}: the shards do not add up to {self.plan.rows} rows")
        self.shape: tuple[int, int, int] = self.plan.latent_shape
        self._maps = [_open_shard(path, (rows, *self.shape), self.plan.dtype) for path, rows in shards]
        self._starts = np.cumsum([0, *(rows for _, rows in shards)])

    def __len__(self) -> int:
        return self.plan.rows

    def rows(self, indices: Tensor | Sequence[int] | range) -> Tensor:
        """The latents of ``indices`` [n], in that order, repeats allowed: float32 ``[n, C, h, w]``.

        Raises:
            IndexError: for an index that is not in [0, len).
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"indices: expected rows in [0, {len(self)}), got {wanted.min()} to {wanted.max()}")
        order = np.argsort(wanted, kind="stable")  # reads each shard once, in order
        bounds = np.searchsorted(wanted[order], self._starts)
        out = torch.empty((wanted.size, *self.shape), dtype=torch.float32)
        for number, rows in enumerate(self._maps):
            places = order[bounds[number] : bounds[number + 1]]
            if places.size:
                values = torch.from_numpy(rows[wanted[places] - self._starts[number]])
                if self.plan.dtype == "bfloat16":  # numpy has no bfloat16: the map holds the bits as int16
                    values = values.view(torch.bfloat16)
                out[torch.from_numpy(places)] = values.float()
        return out

    def batches(self, size: int) -> Iterator[Tensor]:
        """All rows in order, ``size`` at a time: float32 ``[<= size, C, h, w]``."""
        for start in range(0, len(self), size):
            yield self.rows(range(start, min(start + size, len(self))))


def save_latents(
    folder: str | Path,
    latents: Tensor,
    *,
    vae: str = "unknown",
    vae_fingerprint: str = "",
    image_size: int = 0,
    dtype: str = "float32",
) -> LatentStore:
    """Write latents float ``[N, C, h, w]`` from memory as a store (see `LatentWriter` for errors)."""
    sources = tuple(f"row-{row}" for row in range(latents.shape[0]))
    shape: Any = tuple(latents.shape[1:])  # Any, because `StorePlan` checks that it has three sizes
    plan = StorePlan(vae, vae_fingerprint, shape, image_size, sources, dtype=dtype)
    writer = LatentWriter(folder, plan)
    for number, rows in writer.missing():
        writer.write(number, latents[rows.start : rows.stop])
    return writer.finish()


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"latents-{number:05d}.safetensors"


def is_latent_store(folder: str | Path) -> bool:
    """Whether a folder holds an ``index.json`` of this format; other files of the store may still be damaged."""
    try:
        _read_index(Path(folder))
    except InputError:
        return False
    return True


def _read_index(folder: Path) -> tuple[bytes, dict[str, Any]]:
    path = folder / "index.json"
    try:
        text = path.read_bytes()
        index = json.loads(text)
    except OSError:
        partial = folder.with_name(folder.name + ".partial")
        hint = f" ({partial} is unfinished: run its `revq encode` again)" if partial.exists() else ""
        raise InputError(f"{folder}: expected a folder of latents, found no index.json{hint}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{path}: expected the index of a latent store ({FORMAT}), got something else")
    return text, index


def _open_shard(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Memory map of a shard's tensor; bfloat16 as int16 with the same bits."""
    tag, torch_dtype = _DTYPES[dtype]
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size) if header_size < path.stat().st_size else b"")
        entry = header["latents"]
        start, stop = entry["data_offsets"]
        found = (tuple(entry["shape"]), entry["dtype"], stop - start, path.stat().st_size)
    except FileNotFoundError:
        raise InputError(f"{path}: missing from the latent store") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged, not a safetensors file of latents") from None
    size = int(np.prod(shape)) * torch_dtype.itemsize
    if found != (shape, tag, size, 8 + header_size + stop):
        raise InputError(
            f"{path}: expected {shape} {dtype} in {size} bytes, got {found[0]} {found[1]} in a file of {found[3]}"
        )
    numpy_dtype = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}[dtype]
    return np.memmap(path, numpy_dtype, mode="r", offset=8 + header_size + start, shape=shape)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
