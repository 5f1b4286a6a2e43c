"""Writes a latent store shard by shard; keeps the shards of an interrupted or older store whose images are the same."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revq.data.atomic import (
    atomic_file,
    carry_over,
    check_writable_folder,
    exchange_folders,
    folder_lock,
    link_or_copy,
)
from revq.data.json_text import manifest_text, read_json, read_manifest
from revq.data.latents import (
    DTYPES,
    FORMAT,
    INDEX,
    UNFINISHED,
    LatentStore,
    ShardEntry,
    StorePlan,
    check_shard,
    parse_index,
)
from revq.data.tensor_file import TensorFile, TensorFileWriter
from revq.data.text_list import TextBuffer, TextList, encode_text
from revq.errors import InputError

SHARD_BYTES = 256 << 20


class Source(NamedTuple):
    """An image, or another sample, whose latents are stored."""

    name: str
    """Its name, as a path relative to the folder it came from."""
    sha256: bytes = bytes(32)
    """SHA-256 of its file's bytes; zeros if it does not come from a file."""
    size: int = 0
    """Size of its file in bytes."""
    time: int = 0
    """Time of the file's last change, in nanoseconds."""
    label: int | None = None
    """Its class.  Either all samples have one, or none."""


class Skipped(NamedTuple):
    """An image that could not be read."""

    source: Source
    reason: str


class KnownShard(NamedTuple):
    """A complete shard of an earlier writer.  What it holds is read on demand: a million names take memory."""

    id: str
    folder: Path
    first: str
    """Name of its first image."""
    length: int
    """Images, with those that were skipped."""

    def images(self) -> list[tuple[Source, str | None]]:
        """The images in the order in which they were read, each with the reason if it was skipped."""
        sources, skipped = _read_sources(TensorFile(self.folder / f"sources-{self.id}.safetensors"))
        images: list[tuple[Source, str | None]] = [(source, None) for source in sources]
        for place, item in reversed(skipped):  # a place counts the sources before it
            images.insert(place, (item.source, item.reason))
        return images


class LatentWriter:
    """Writes a store into ``<folder>.partial``, which takes the place of ``<folder>`` when it is complete.

    A writer with the same plan finds the finished shards of an interrupted writer, and those of a store that exists, in
    `known` and may keep them.  The writer is a context manager, which holds the lock of ``folder``::

        with LatentWriter("store", StorePlan("my VAE", "", (4, 8, 8))) as writer:
            for name, latent in my_latents:
                writer.add(Source(name))
                writer.append(latent[None])
            store = writer.finish()

    Args:
        folder: folder of the store.
        plan: description of the store.
        shard_bytes: a shard is closed when its latents have this size.
        overwrite: replace a store of another plan, or the rest of an interrupted writer with another plan.

    Attributes:
        known: finished shards of earlier writers with the same plan, in no particular order.
        shard_sources: images of a full shard.

    Raises:
        InputError: if ``folder`` or ``<folder>.partial`` holds anything but a store; without ``overwrite``, if either has
            another plan, naming what differs; if another process writes to ``folder``.
    """

    def __init__(
        self, folder: str | Path, plan: StorePlan, *, shard_bytes: int = SHARD_BYTES, overwrite: bool = False
    ) -> None:
        if shard_bytes < 1:
            raise InputError(f"shard_bytes: expected a number >= 1, got {shard_bytes}")
        self.folder, self.plan = Path(folder).resolve(), plan
        self._partial = self.folder.with_name(self.folder.name + ".partial")
        dtype = DTYPES[plan.dtype]
        self._row_bytes = torch.Size(plan.latent_shape).numel() * dtype.itemsize * len(plan.tensors)
        self.shard_sources = max(1, shard_bytes // (self._row_bytes * plan.rows_per_source))
        self._entries: list[ShardEntry] = []
        self._rows: dict[str, list[Tensor]] = {name: [] for name in plan.tensors}
        self._sources: list[Source] = []
        self._skipped: list[tuple[int, Skipped]] = []
        self._first_skipped: tuple[str, str] | None = None  # for the message if no image can be read
        self.known: list[KnownShard] = []
        with ExitStack() as lock:
            lock.enter_context(folder_lock(self.folder))
            self._open(overwrite)
            self._exit = lock.pop_all()  # held until `close`

    def _open(self, overwrite: bool) -> None:
        """Find the shards of earlier writers, and create ``<folder>.partial``."""
        for place in (self.folder, self._partial):
            kind = _writable_kind(place)
            if kind == "new":
                continue
            if kind == "other":
                older = "expected a new or empty folder to write latents into"
                raise InputError(f"{place}: {older}, it exists already and holds something else")
            differences = _differences(place, self.plan)
            if differences is None:
                self.known += _known_shards(place, self.plan)
            elif not overwrite:
                raise InputError(
                    f"{place}: expected latents of the same kind, but {differences}; give another folder, or --overwrite to replace them (overwrite=True)"
                )
            elif place == self._partial:
                shutil.rmtree(place)
        self._partial.mkdir(parents=True, exist_ok=True)
        index = {"format": UNFINISHED, "plan": self.plan.to_dict(), "shards": []}
        with atomic_file(self._partial / INDEX) as path:
            path.write_text(manifest_text(index), encoding="utf-8")

    def keep(self, shard: KnownShard) -> None:
        """Take a shard of an earlier writer as the next one."""
        self.close_shard()
        for prefix in ("latents", "sources"):
            name = f"{prefix}-{shard.id}.safetensors"
            if not (self._partial / name).exists():
                link_or_copy(shard.folder / name, self._partial / name)
        self._entries.append(_entry(self._partial, shard.id))

    def append(self, latents: Tensor, *, mirrored: Tensor | None = None, log_variances: Tensor | None = None) -> None:
        """Append rows: floats ``[n, *latent_shape]``; the plan says which of the optional tensors belong to them.

        Raises:
            InputError: for another shape, or if a value does not fit the store's dtype or is not finite.
        """
        given = {"latents": latents, "mirrored": mirrored, "log_variances": log_variances}
        for name, value in given.items():
            if (value is None) == (name in self.plan.tensors):
                raise InputError(f"{name}: expected {'a tensor' if value is None else 'None'}, as the plan says")
        for name in self.plan.tensors:
            value = given[name]
            assert value is not None
            if tuple(value.shape) != (latents.shape[0], *self.plan.latent_shape) or not value.is_floating_point():
                raise InputError(
                    f"{name}: expected floats [n, *{self.plan.latent_shape}], got {value.dtype} {tuple(value.shape)}"
                )
            stored = value.detach().to("cpu", DTYPES[self.plan.dtype]).contiguous()
            if not bool(torch.isfinite(stored).all()):
                raise InputError(f"{name}: expected finite numbers within {self.plan.dtype}'s range, got others")
            self._rows[name].append(stored.clone() if stored.data_ptr() == value.data_ptr() else stored)

    def add(self, source: Source) -> None:
        """Say which image the next `StorePlan.rows_per_source` rows are of; closes the last shard if it is full."""
        encode_text(source.name)
        if self.shard_is_full:
            self.close_shard()
        self._sources.append(source)

    def skip(self, source: Source, reason: str) -> None:
        """Note an image that could not be read."""
        encode_text(source.name)
        self._skipped.append((len(self._sources), Skipped(source, reason)))
        self._first_skipped = self._first_skipped or (source.name, reason)

    @property
    def shard_is_full(self) -> bool:
        """Whether the next image belongs to the next shard."""
        return len(self._sources) >= self.shard_sources

    def close_shard(self) -> None:
        """Write the images since the last shard as a shard."""
        if not self._sources and not self._skipped:
            return
        rows = sum(map(len, self._rows["latents"]))
        if rows != len(self._sources) * self.plan.rows_per_source:
            raise RuntimeError(f"{len(self._sources)} images have {rows} rows")
        id_ = _shard_id(self.plan, self._sources, self._skipped)
        entry_files = {prefix: self._partial / f"{prefix}-{id_}.safetensors" for prefix in ("sources", "latents")}
        # The file of the latents comes second: where it exists, the shard is complete.
        with atomic_file(entry_files["sources"]) as path:
            _write_sources(path, self._sources, self._skipped)
        with atomic_file(entry_files["latents"]) as path:
            writer = TensorFileWriter(path, max_bytes=rows * self._row_bytes)
            try:
                for name in self.plan.tensors:
                    writer.begin(name, DTYPES[self.plan.dtype], self.plan.latent_shape)
                    for part in self._rows[name]:
                        writer.append(part)
                writer.close({})
            finally:
                writer.abandon()
        self._entries.append(_entry(self._partial, id_))
        self._rows = {name: [] for name in self.plan.tensors}
        self._sources, self._skipped = [], []

    def finish(self) -> LatentStore:
        """Close the last shard, give the store its name and open it; a store that would stay the same is not touched.

        Raises:
            InputError: if there is no shard.
        """
        self.close_shard()
        if not any(entry.sources for entry in self._entries):
            for entry in self._entries:  # these hold nothing but images that could not be read
                (self._partial / entry.latents_file).unlink()
            first = f"; {self._first_skipped[0]}: {self._first_skipped[1]}" if self._first_skipped else ""
            raise InputError(f"{self.folder}: expected at least one image that can be read, got none{first}")
        shards = [asdict(entry) for entry in self._entries]
        index = manifest_text({"format": FORMAT, "plan": self.plan.to_dict(), "shards": shards})
        finished = self.folder / INDEX
        if finished.is_file() and finished.read_bytes() == index.encode():
            shutil.rmtree(self._partial)
            self._exit.close()
            return LatentStore(self.folder)
        with atomic_file(self._partial / INDEX) as path:
            path.write_text(index, encoding="utf-8")
        used = {INDEX, *(entry.latents_file for entry in self._entries), *(e.sources_file for e in self._entries)}
        for path in self._partial.iterdir():
            if path.name not in used and _is_ours(path.name):
                path.unlink()
        try:
            self._partial.rename(self.folder)  # replaces an empty folder, too
        except OSError:
            if not self.folder.is_dir():
                raise
            carry_over(self.folder, self._partial, _is_ours)
            exchange_folders(self._partial, self.folder)
            shutil.rmtree(self._partial)
        self._exit.close()
        return LatentStore(self.folder)

    def close(self) -> None:
        """Release the lock.  Finished shards stay in ``<folder>.partial`` for the next writer; without any, it goes."""
        if self._partial.is_dir() and not any(self._partial.glob("latents-*")):
            shutil.rmtree(self._partial, ignore_errors=True)
        self._exit.close()

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def save_latents(
    folder: str | Path,
    latents: Tensor,
    *,
    vae: str = "unknown",
    vae_fingerprint: str = "",
    image_size: int = 0,
    dtype: str = "float32",
    names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    mirrored: Tensor | None = None,
    log_variances: Tensor | None = None,
    options: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> LatentStore:
    """Write latents float ``[N, *shape]`` from memory as a store.

    Args:
        folder: folder of the new store.
        latents: of any rank: images ``[N, C, h, w]``, videos ``[N, C, f, h, w]``, sounds ``[N, C, l]``.
        names: one per latent; ``row-0``, ``row-1``, ... without it.
        labels: one integer per latent.
        mirrored: latents of the mirrored images, of the same shape.
        log_variances: logarithms of the posterior's variances, of the same shape.
        vae, vae_fingerprint, image_size, dtype, options: see `StorePlan`.
        shard_bytes, overwrite: see `LatentWriter`.

    Raises:
        InputError: for values that are not finite or shapes that do not fit; see also `LatentWriter`.
    """
    rows = latents.shape[0]
    for name, values in (("names", names), ("labels", labels)):
        if values is not None and len(values) != rows:
            raise InputError(f"{name}: expected one per latent, {rows}, got {len(values)}")
    plan = StorePlan(
        vae,
        vae_fingerprint,
        tuple(latents.shape[1:]),
        image_size,
        dtype=dtype,
        mirrored=mirrored is not None,
        log_variances=log_variances is not None,
        options=options or {},
    )
    with LatentWriter(folder, plan, shard_bytes=shard_bytes, overwrite=overwrite) as writer:
        if writer.folder.exists() and any(writer.folder.iterdir()) and not overwrite:
            raise InputError(f"{folder}: expected a new or empty folder to write latents into, it exists already")
        for start in range(0, rows, writer.shard_sources):
            piece = slice(start, min(start + writer.shard_sources, rows))
            for row in range(piece.start, piece.stop):
                name = names[row] if names is not None else f"row-{row}"
                writer.add(Source(name, label=None if labels is None else int(labels[row])))
            writer.append(
                latents[piece],
                mirrored=None if mirrored is None else mirrored[piece],
                log_variances=None if log_variances is None else log_variances[piece],
            )
        return writer.finish()


def _shard_id(plan: StorePlan, sources: Sequence[Source], skipped: Sequence[tuple[int, Skipped]]) -> str:
    """A digest of what a shard depends on; also tells apart sources without a file by their place in memory."""
    digest = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode())
    for kind, source, label in (
        *(("image", source, source.label) for source in sources),
        *((f"skipped {place}", item.source, item.reason) for place, item in skipped),
    ):
        digest.update(f"{kind} {label} {source.sha256.hex()} ".encode() + encode_text(source.name) + b"\0")
    return digest.hexdigest()[:24]


def _entry(folder: Path, id_: str) -> ShardEntry:
    latents, names = (folder / f"{prefix}-{id_}.safetensors" for prefix in ("latents", "sources"))
    digest = hashlib.sha256()
    with latents.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    file = TensorFile(names)
    return ShardEntry(
        id=id_,
        sources=file.shape("sha256")[0],
        latents_bytes=latents.stat().st_size,
        latents_sha256=digest.hexdigest(),
        latents_header=TensorFile(latents).header_digest,
        sources_header=file.header_digest,
    )


def _write_sources(path: Path, sources: Sequence[Source], skipped: Sequence[tuple[int, Skipped]]) -> None:
    everyone = [*sources, *(item.source for _, item in skipped)]
    names, skipped_names = TextBuffer(s.name for s in sources), TextBuffer(item.source.name for _, item in skipped)
    reasons = TextBuffer(item.reason for _, item in skipped)
    size = names.nbytes + skipped_names.nbytes + reasons.nbytes + 128 * len(everyone)
    writer = TensorFileWriter(path, max_bytes=size)
    try:
        names.write(writer, "names")
        _write_files(writer, "", sources)
        if sources and sources[0].label is not None:
            writer.add("labels", torch.tensor([source.label for source in sources], dtype=torch.int64))
        if skipped:
            skipped_names.write(writer, "skipped")
            reasons.write(writer, "reasons")
            _write_files(writer, "skipped.", [item.source for _, item in skipped])
            writer.add("skipped.places", torch.tensor([place for place, _ in skipped], dtype=torch.int64))
        writer.close({})
    finally:
        writer.abandon()


def _write_files(writer: TensorFileWriter, prefix: str, sources: Sequence[Source]) -> None:
    """What identifies the files of images: SHA-256 uint8 ``[n, 32]``, sizes and times int64 ``[n, 2]``."""
    digests = np.frombuffer(b"".join(source.sha256 for source in sources), np.uint8).reshape(-1, 32)
    writer.add(f"{prefix}sha256", torch.from_numpy(digests.copy()))
    files = np.array([(source.size, source.time) for source in sources], np.int64).reshape(-1, 2)
    writer.add(f"{prefix}files", torch.from_numpy(files))


def _read_sources(file: TensorFile) -> tuple[list[Source], list[tuple[int, Skipped]]]:
    sources, skipped = _read_files(file, "names", ""), []
    if "labels" in file.names:
        labels = file.tensor("labels").tolist()
        sources = [source._replace(label=label) for source, label in zip(sources, labels, strict=True)]
    if "skipped.places" in file.names:
        places, reasons = file.tensor("skipped.places").tolist(), TextList(file, "reasons")
        found = _read_files(file, "skipped", "skipped.")
        skipped = [(place, Skipped(image, why)) for place, image, why in zip(places, found, reasons, strict=True)]
    return sources, skipped


def _read_files(file: TensorFile, names: str, prefix: str) -> list[Source]:
    digests, files = file.tensor(f"{prefix}sha256").numpy(), file.tensor(f"{prefix}files").tolist()
    return [
        Source(name, digest.tobytes(), size, time)
        for name, digest, (size, time) in zip(TextList(file, names), digests, files, strict=True)
    ]


def _writable_kind(folder: Path) -> str:
    """What a writer finds at the place of a store: ``new`` (nothing, or nothing of value), ``store`` or ``other``."""
    if not folder.exists():
        check_writable_folder(folder, frozenset())
        return "new"
    if not folder.is_dir():
        return "other"
    names = [path.name for path in folder.iterdir()]
    if INDEX in names and str(_format(folder)).startswith("revq-latents-"):
        return "store"
    return "new" if all(name.startswith(".revq-") or name == ".DS_Store" for name in names) else "other"


def _format(folder: Path) -> Any:
    try:
        return read_json(folder / INDEX).get("format")
    except InputError:
        return None


def _differences(folder: Path, plan: StorePlan) -> str | None:
    """How the plan of a finished or unfinished store differs from ``plan``, in words; None if it does not."""
    format_ = _format(folder)
    if format_ not in (FORMAT, UNFINISHED):
        return f"these are of the format {format_}"
    try:
        before, _ = parse_index(folder, read_manifest(folder / INDEX))
    except InputError as error:
        return f"its index is damaged ({str(error).removeprefix(f'{folder / INDEX}: ')})"
    old, new = before.to_dict(), plan.to_dict()
    old, new = {**old, **old.pop("options")}, {**new, **new.pop("options")}
    changes = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in [*new, *(old.keys() - new.keys())]
        if old.get(name) != new.get(name)
    ]
    return ", ".join(changes) or None


def _known_shards(folder: Path, plan: StorePlan) -> list[KnownShard]:
    """The complete shards in a folder; a damaged one counts as missing, so that it is written again."""
    shards = []
    for path in sorted(folder.glob("latents-*.safetensors")):
        id_ = path.stem.removeprefix("latents-")
        try:
            sources, skipped = _read_sources(TensorFile(folder / f"sources-{id_}.safetensors"))
            latents = TensorFile(path)
            check_shard(latents, plan, len(sources) * plan.rows_per_source)
            latents.verify()
        except InputError:
            continue
        if _shard_id(plan, sources, skipped) == id_:
            first = skipped[0][1].source if skipped and skipped[0][0] == 0 else sources[0]
            shards.append(KnownShard(id_, folder, first.name, len(sources) + len(skipped)))
    return shards


def _is_ours(name: str) -> bool:
    return name in (INDEX, "plan.json") or name.startswith((".revq-", "latents-", "sources-"))
