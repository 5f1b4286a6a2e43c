"""The latent store: the latents of a data set on disk, so that the VAE encodes each image once.

A store is a folder.  A shard of it is two safetensors files: ``latents-<id>.safetensors`` holds the tensors ``latents``
``[rows, *shape]`` and, if the plan says so, ``mirrored`` and ``log_variances`` of the same shape; ``sources-<id>.safetensors``
holds the names, the SHA-256 and the labels of the images, and the images that could not be read.  ``index.json`` names the
shards in order.  Rows are read on demand, so a store may be larger than the memory; a process keeps a handful of files
open, however many shards there are.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from revq.data.json_text import read_json, read_manifest
from revq.data.listing import SkippedFile
from revq.data.tensor_file import TensorFile
from revq.data.text_list import TextList
from revq.errors import InputError

FORMAT = "revq-latents-2"
UNFINISHED = "revq-latents-2-unfinished"
_FIRST_FORMAT = "revq-latents-1"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INDEX = "index.json"


@dataclass(frozen=True)
class StorePlan:
    """What the latents of a store are, and what they depend on beside the images.

    Row r holds crop r mod c of image r // c, where c = max(1, crops).
    """

    vae: str
    """Name of the VAE, see `FrozenVAE.name`."""
    vae_fingerprint: str
    """See `FrozenVAE.fingerprint`."""
    latent_shape: tuple[int, ...]
    """Shape of one latent: (C, h, w) of an image, (C, f, h, w) of a video, (C, l) of a sound, or any other."""
    image_size: int = 0
    """Side of a crop, in pixels; 0 if the latents are not of square images."""
    crops: int = 0
    """Random crops per image; 0 means one center crop, or one latent per sample."""
    seed: int = 0
    """Seed of the random crops."""
    dtype: str = "float32"
    """dtype of the stored latents: float32, float16 or bfloat16."""
    mirrored: bool = False
    """Whether each row has a second latent, of the mirrored crop."""
    log_variances: bool = False
    """Whether each row has the logarithms of the variances of the VAE's posterior, whose means are the latents."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the latents depend on, or their user wants to find: JSON values by name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        if self.dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("image_size", "crops"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                raise InputError(f"{name}: expected an integer >= 0, got {getattr(self, name)!r}")
        if not _is_int(self.seed):
            raise InputError(f"seed: expected an integer, got {self.seed!r}")
        if not self.latent_shape or not all(_is_int(size) and size >= 1 for size in self.latent_shape):
            raise InputError(f"latent_shape: expected positive integers such as (C, h, w), got {self.latent_shape}")
        for name in ("mirrored", "log_variances"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        try:
            text = json.dumps(dict(self.options), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"options: expected JSON values by name, got {self.options!r} ({error})") from None
        object.__setattr__(self, "options", json.loads(text))

    @property
    def rows_per_source(self) -> int:
        """Rows of one image."""
        return max(1, self.crops)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors of a shard."""
        extra = [name for name in ("mirrored", "log_variances") if getattr(self, name)]
        return ("latents", *extra)

    def to_dict(self) -> dict[str, Any]:
        """The plain JSON form."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class ShardEntry:
    """One shard as ``index.json`` names it."""

    id: str
    """Part of the names of its two files: a digest of the plan and of the images."""
    sources: int
    """Images."""
    latents_bytes: int
    """Size of the file of the latents."""
    latents_sha256: str
    """SHA-256 of that file."""
    latents_header: str
    """SHA-256 of that file's header, which holds the checksums of its blocks."""
    sources_header: str
    """SHA-256 of the header of the file of the images' names."""

    @property
    def latents_file(self) -> str:
        """Name of the file of the latents."""
        return f"latents-{self.id}.safetensors"

    @property
    def sources_file(self) -> str:
        """Name of the file of the images' names."""
        return f"sources-{self.id}.safetensors"


class LatentStore:
    """A folder of latents, open for reading; a map-style dataset that is pickled by its path.

    The bytes of a shard are compared with their checksums when they are read for the first time.

    Attributes:
        folder: the folder's absolute path.
        plan: description of the store.
        shape: shape of one latent.
        fingerprint: SHA-256 of the plan and of the shards' SHA-256; equal fingerprints mean equal latents.

    Raises:
        InputError: if the folder or its index is missing, damaged, of another format or of a newer version; later, if
            a file that is read is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        index = read_index(self.folder)
        self._shards: list[_Shard] | list[_FirstShard]
        self._names: list[str] | None = None  # of a store of the first format
        if index["format"] == _FIRST_FORMAT:
            self.plan, self._shards, self._names = _first_format(self.folder, index)
            self.fingerprint = hashlib.sha256((self.folder / INDEX).read_bytes()).hexdigest()
        else:
            self.plan, entries = parse_index(self.folder, index)
            for entry in entries:
                _check_size(self.folder / entry.latents_file, entry.latents_bytes)
            self._shards = [_Shard(self.folder, self.plan, entry) for entry in entries]
            self.fingerprint = _fingerprint(self.plan, entries)
        self.shape: tuple[int, ...] = self.plan.latent_shape
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Tensor:
        """One latent: float32 ``[*shape]``."""
        return self.rows([range(len(self))[row]])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Tensor]:
        """Several latents; a `torch.utils.data.DataLoader` fetches its batches by this method."""
        return list(self.rows([range(len(self))[row] for row in rows]))

    def rows(
        self,
        indices: Tensor | Sequence[int] | range,
        tensor: Literal["latents", "mirrored", "log_variances"] = "latents",
    ) -> Tensor:
        """The latents of ``indices`` [n], in that order, repeats allowed: float32 ``[n, *shape]``.

        Args:
            indices: rows.
            tensor: ``mirrored`` reads the latents of the mirrored crops, ``log_variances`` those of the posterior.

        Raises:
            IndexError: for an index that is not in [0, len).
            InputError: if the store does not have such a tensor; if a file is missing or damaged.
        """
        if tensor not in self.plan.tensors:
            raise InputError(f"tensor: expected one of {', '.join(self.plan.tensors)} in {self.folder}, got {tensor!r}")
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"indices: expected rows in [0, {len(self)}), got {wanted.min()} to {wanted.max()}")
        order = np.argsort(wanted, kind="stable")  # reads each shard once, in order
        ordered = wanted[order]
        shards = np.searchsorted(self._starts, ordered, side="right") - 1
        out = torch.empty((wanted.size, *self.shape), dtype=torch.float32)
        for number in np.unique(shards).tolist():
            first, last = np.searchsorted(shards, [number, number + 1]).tolist()
            values = self._shards[number].open().gather(tensor, ordered[first:last] - self._starts[number])
            out[torch.from_numpy(order[first:last])] = values.float()
        return out

    def batches(self, size: int) -> Iterator[Tensor]:
        """All rows in order, ``size`` at a time: float32 ``[<= size, *shape]``."""
        for start in range(0, len(self), size):
            yield self.rows(range(start, min(start + size, len(self))))

    @property
    def names(self) -> "Sequence[str]":
        """Names of the images in order, as paths relative to the folder they came from; read on demand."""
        if self._names is not None:
            return self._names
        return _Joined([shard.names for shard in self._shards if isinstance(shard, _Shard)])

    @property
    def skipped(self) -> list[SkippedFile]:
        """The images that could not be read: name and reason."""
        return [pair for shard in self._shards if isinstance(shard, _Shard) for pair in shard.skipped]

    @property
    def labels(self) -> Tensor | None:
        """int64 ``[images]``, or None if the store has no labels."""
        parts = [shard.labels for shard in self._shards if isinstance(shard, _Shard)]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if known else None

    def verify(self) -> None:
        """Read every file of the store.

        Raises:
            InputError: naming the first file that is missing or damaged.
        """
        for shard in self._shards:
            shard.verify()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]  # a pickle holds the path alone
        if self.fingerprint != state["fingerprint"]:
            raise InputError(f"{self.folder}: expected the latents that were pickled, but the store has changed")


class _Shard:
    """A shard of the present format.  Its files are opened when they are used."""

    def __init__(self, folder: Path, plan: StorePlan, entry: ShardEntry) -> None:
        self._folder, self._plan, self._entry = folder, plan, entry
        self.rows = entry.sources * plan.rows_per_source
        self._file: TensorFile | None = None
        self._sources_file: TensorFile | None = None

    def open(self) -> TensorFile:
        if self._file is None:
            file = _open(self._folder / self._entry.latents_file, self._entry.latents_header)
            check_shard(file, self._plan, self.rows)
            self._file = file
        return self._file

    @property
    def names(self) -> "_Lazy":
        return _Lazy(self._entry.sources, lambda: TextList(self._sources(), "names"))

    @property
    def skipped(self) -> list[SkippedFile]:
        file = self._sources()
        if "skipped.ends" not in file.names:
            return []
        return list(map(SkippedFile, TextList(file, "skipped"), TextList(file, "reasons")))

    @property
    def labels(self) -> Tensor | None:
        file = self._sources()
        return file.tensor("labels") if "labels" in file.names else None

    def verify(self) -> None:
        path = self._folder / self._entry.latents_file
        self.open().verify()
        self._sources().verify()
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != self._entry.latents_sha256:
            raise InputError(f"{path}: damaged: it does not have its SHA-256")

    def _sources(self) -> TensorFile:
        if self._sources_file is None:
            self._sources_file = _open(self._folder / self._entry.sources_file, self._entry.sources_header)
        return self._sources_file


class _FirstShard:
    """A shard of the first format, without checksums of blocks: the whole file is verified when it is used first."""

    def __init__(self, path: Path, plan: StorePlan, rows: int, sha256: str) -> None:
        self._path, self._plan, self.rows, self._sha256 = path, plan, rows, sha256
        self._file: TensorFile | None = None

    def open(self) -> TensorFile:
        if self._file is None:
            self.verify()
        assert self._file is not None  # for the type checker
        return self._file

    def verify(self) -> None:
        if not self._path.is_file():
            raise InputError(f"{self._path}: missing from the latent store")
        file = TensorFile(self._path, checksums=False)
        check_shard(file, self._plan, self.rows)
        if hashlib.sha256(self._path.read_bytes()).hexdigest() != self._sha256:
            raise InputError(f"{self._path}: damaged: it does not have its SHA-256")
        self._file = file


class _Lazy(Sequence[str]):
    """The names of one shard, whose file is opened when one is read."""

    def __init__(self, length: int, texts: Any) -> None:
        self._length, self._texts = length, texts

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._texts()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts())


class _Joined(Sequence[str]):
    """The names of all shards, one after the other."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts, self._starts = parts, [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._parts[part][number - self._starts[part]]

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            yield from part

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # compared by content, like a list


def is_latent_store(folder: str | Path) -> bool:
    """Whether a folder holds an ``index.json`` of a latent store; files of the store may still be damaged."""
    path = Path(folder) / INDEX
    if not path.is_file():
        return False
    try:
        return str(read_json(path).get("format")).startswith("revq-latents-")
    except InputError:
        return False


def read_index(folder: Path) -> dict[str, Any]:
    """The values of a finished store's index.

    Raises:
        InputError: if there is none, or it is damaged, of another format or of a newer version.
    """
    path = folder / INDEX
    if not path.is_file():
        partial = folder.with_name(folder.name + ".partial")
        hint = f" ({partial} is unfinished: run its `revq encode` again)" if partial.exists() else ""
        raise InputError(f"{folder}: expected a folder of latents, found no {INDEX}{hint}")
    format_ = read_json(path).get("format")
    if format_ == UNFINISHED:
        raise InputError(f"{folder}: expected finished latents, got unfinished ones: run its `revq encode` again")
    if format_ not in (FORMAT, _FIRST_FORMAT):
        if isinstance(format_, str) and format_.startswith("revq-latents-"):
            raise InputError(f"{path}: expected {FORMAT} or older, got {format_}: a newer revq wrote it")
        raise InputError(f"{path}: expected the index of a latent store ({FORMAT}), got something else")
    return read_manifest(path, unchecked=frozenset({_FIRST_FORMAT}))


def parse_index(folder: Path, index: dict[str, Any]) -> tuple[StorePlan, list[ShardEntry]]:
    """The plan and the shards of an index of the present format."""
    path = folder / INDEX
    try:
        known = {item.name for item in fields(StorePlan)}
        plan = StorePlan(**{name: value for name, value in index["plan"].items() if name in known})
        entries = [ShardEntry(**entry) for entry in index["shards"]]
        for entry in entries:
            if not (str(entry.id).isalnum() and _is_int(entry.sources) and entry.sources >= 0):
                raise ValueError(f"shard {entry.id!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a valid latent index: {error}") from None
    return plan, entries


def check_shard(file: TensorFile, plan: StorePlan, rows: int) -> None:
    """Check the tensors of a shard.

    Raises:
        InputError: if they are not those of the plan.
    """
    expected = ((rows, *plan.latent_shape), DTYPES[plan.dtype])
    for name in plan.tensors:
        found = (file.shape(name), file.dtype(name)) if name in file.names else None
        if found != expected:
            raise InputError(f"{file.path}: expected {name} {expected[0]} {plan.dtype}, got {found or 'none'}")


def _fingerprint(plan: StorePlan, entries: Sequence[ShardEntry]) -> str:
    parts = [plan.to_dict(), [[entry.sources, entry.latents_sha256] for entry in entries]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_size(path: Path, size: int) -> None:
    """Find a missing or shortened file before any work is done, without opening it."""
    if not path.is_file():
        raise InputError(f"{path}: missing from the latent store")
    if path.stat().st_size != size:
        raise InputError(f"{path}: damaged: expected {size} bytes, got {path.stat().st_size}")


def _open(path: Path, header: str) -> TensorFile:
    if not path.is_file():
        raise InputError(f"{path}: missing from the latent store")
    file = TensorFile(path)
    if file.header_digest != header:
        raise InputError(f"{path}: damaged, or of another store: its header does not have its SHA-256")
    return file


def _first_format(folder: Path, index: dict[str, Any]) -> tuple[StorePlan, list[_FirstShard], list[str]]:
    path = folder / INDEX
    try:
        names = [str(name) for name in index["sources"]]
        known = ("vae", "vae_fingerprint", "latent_shape", "image_size", "crops", "seed", "dtype")
        plan = StorePlan(**{name: index[name] for name in known}, options={"inputs": index["inputs"]})
        shards = []
        for shard in index["shards"]:
            name, rows = str(shard["file"]), shard["rows"]
            if Path(name).name != name or not _is_int(rows) or rows < 1:
                raise ValueError(f"shard {name!r} of {rows!r} rows")
            shards.append(_FirstShard(folder / name, plan, rows, str(shard["sha256"])))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a valid latent index: {error}") from None
    if sum(shard.rows for shard in shards) != len(names) * plan.rows_per_source:
        raise InputError(f"{path}: the shards do not add up to {len(names) * plan.rows_per_source} rows")
    return plan, shards, names


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
