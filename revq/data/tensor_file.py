"""Safetensors files with a checksum per block: written as a stream, read by rows, each block verified at its first read.

The files are ordinary safetensors files.  Their metadata has an entry ``revq_checksums``, a JSON text::

    {"algorithm": "crc32", "block_bytes": 2097152, "header": "<8 hex>", "tensors": {"<name>": "<8 hex per block>"}}

Block i of a tensor holds the bytes i * block_bytes ... (i + 1) * block_bytes - 1 of its data.  ``header`` is the CRC-32 of
the file's header, in which that value itself is ``00000000``.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revq.data.json_text import parse_json
from revq.errors import InputError

BLOCK_BYTES = 2 << 20
_KEY = "revq_checksums"
_UNSET = "00000000"
_HEADER_FIELD = re.compile(rb'(\\"header\\": \\")([0-9a-f]{8})(\\")')
_OPEN_FILES = 8
"""Most files that a process keeps open for reading."""
_MOST_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_TAGS = {dtype: tag for tag, dtype in _DTYPES.items()}


class TensorFileWriter:
    """Writes tensors one after the other, each as a stream of rows.

    Args:
        path: an existing or new file, which is overwritten; use it inside `revq.data.atomic.atomic_file`.
        max_bytes: upper bound of the size of all tensors; the header's room depends on it.
        max_tensors: upper bound of their number.
        max_text: upper bound of the characters of the metadata and of the tensors' names.
    """

    def __init__(self, path: str | Path, *, max_bytes: int, max_tensors: int = 12, max_text: int = 256) -> None:
        blocks = max_bytes // BLOCK_BYTES + max_tensors
        # Four times the text: JSON inside JSON escapes quotes and other letters.
        self._room = 8 * -(-(256 + 8 * blocks + 192 * max_tensors + 4 * max_text) // 8)
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed by `close`
        self._file.seek(8 + self._room)
        self._entries: dict[str, dict[str, Any]] = {}
        self._checksums: dict[str, str] = {}
        self._size = 0
        self._name = ""
        self._crc, self._filled = 0, 0  # of the last, incomplete block

    def begin(self, name: str, dtype: torch.dtype, row_shape: Sequence[int]) -> None:
        """Begin a tensor ``[rows, *row_shape]``; the number of rows follows from `append`."""
        self._end_block()
        self._name = name
        self._entries[name] = {
            "dtype": _TAGS[dtype],
            "shape": [0, *row_shape],
            "data_offsets": [self._size, self._size],
        }
        self._checksums[name] = ""

    def append(self, rows: Tensor) -> None:
        """Append ``rows [n, *row_shape]`` to the tensor that was begun last."""
        entry = self._entries[self._name]
        if [*rows.shape[1:]] != entry["shape"][1:] or _TAGS.get(rows.dtype) != entry["dtype"]:
            raise ValueError(
                f"rows: expected {entry['dtype']} [n, *{entry['shape'][1:]}], got {rows.dtype} {[*rows.shape]}"
            )
        data = _bytes_of(rows).data
        entry["shape"][0] += rows.shape[0]
        entry["data_offsets"][1] += len(data)
        self._size += len(data)
        self._file.write(data)
        while len(data):
            piece = data[: BLOCK_BYTES - self._filled]
            self._crc, self._filled = zlib.crc32(piece, self._crc), self._filled + len(piece)
            if self._filled == BLOCK_BYTES:
                self._end_block()
            data = data[len(piece) :]

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor of any shape."""
        shape = [*tensor.shape]
        self.begin(name, tensor.dtype, [])
        self.append(tensor.reshape(-1))
        self._entries[name]["shape"] = shape

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the header and close the file."""
        self._end_block()
        sums = {"algorithm": "crc32", "block_bytes": BLOCK_BYTES, "header": _UNSET, "tensors": self._checksums}
        header = json.dumps({"__metadata__": {**metadata, _KEY: json.dumps(sums)}, **self._entries}).encode()
        if len(header) > self._room:
            raise ValueError(f"metadata: expected a header of at most {self._room} bytes, got {len(header)}")
        header = header.ljust(self._room)
        crc = f"{zlib.crc32(header):08x}".encode()
        header = _HEADER_FIELD.sub(lambda match: match[1] + crc + match[3], header, count=1)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.close()

    def abandon(self) -> None:
        """Close the file without a header."""
        self._file.close()

    def _end_block(self) -> None:
        if self._filled:
            self._checksums[self._name] += f"{self._crc:08x}"
            self._crc, self._filled = 0, 0


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write whole tensors of any shape with their checksums; use it inside `revq.data.atomic.atomic_file`."""
    metadata = metadata or {}
    text = sum(map(len, [*metadata, *metadata.values(), *tensors, *tensors]))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    dimensions = sum(tensor.dim() for tensor in tensors.values())
    writer = TensorFileWriter(path, max_bytes=size, max_tensors=len(tensors), max_text=text + 24 * dimensions)
    try:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close(metadata)
    finally:
        writer.abandon()


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its data, in bytes from the file's begin
    size: int  # in bytes
    checksums: bytes | None  # four bytes per block, big-endian; None in a file without checksums


class TensorFile:
    """A safetensors file, open for reading; it keeps no descriptor of its own and can be pickled.

    Args:
        path: the file.
        checksums: True refuses a file without checksums.

    Attributes:
        metadata: the texts of the header, without the checksums.
        header_digest: SHA-256 of the header, which holds the checksums of all blocks.

    Raises:
        InputError: if the file is missing or its header is damaged; later, if a block that is read is damaged.
    """

    def __init__(self, path: str | Path, *, checksums: bool = True) -> None:
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise InputError(f"{path}: expected a file, found {'something else' if self.path.exists() else 'nothing'}")
        self._version = _version(self.path.stat())
        self.metadata, self._entries, self.header_digest = _read_header(self.path, required=checksums)
        self._verified = {name: bytearray(-(-entry.size // BLOCK_BYTES)) for name, entry in self._entries.items()}

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return [*self._entries]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        entry = self._entry(name)
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self._read_into(_bytes_of(out), name, 0)
        return out

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows start ... stop - 1 of a tensor, in memory of their own."""
        entry = self._entry(name)
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        self._read_into(_bytes_of(out), name, start * (entry.size // max(1, entry.shape[0])))
        return out

    def gather(self, name: str, rows: np.ndarray) -> Tensor:
        """Rows of a tensor, in memory of their own; neighbors in ascending ``rows`` int64 ``[n]`` are read together."""
        entry = self._entry(name)
        out = torch.empty((len(rows), *entry.shape[1:]), dtype=entry.dtype)
        row_bytes, place = entry.size // max(1, entry.shape[0]), _bytes_of(out).data
        if not len(place):
            return out
        file = self._open()
        breaks = [0, *(np.flatnonzero(rows[1:] != rows[:-1] + 1) + 1).tolist(), len(rows)]
        starts = (rows[breaks[:-1]] * row_bytes).tolist()
        for first, last, start in zip(breaks[:-1], breaks[1:], starts, strict=True):
            part = place[first * row_bytes : last * row_bytes]
            self._verify_blocks(file, name, start, start + len(part))
            file.read_into(part, entry.start + start)
        return out

    def verify(self) -> None:
        """Read every block.

        Raises:
            InputError: naming the first damaged block.
        """
        for name, entry in self._entries.items():
            self._verified[name] = bytearray(len(self._verified[name]))
            for start in range(0, entry.size, BLOCK_BYTES):
                self._read_into(np.empty(min(BLOCK_BYTES, entry.size - start), np.uint8), name, start)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise InputError(f"{self.path}: expected a tensor {name!r}, got {', '.join(self._entries) or 'none'}")
        return self._entries[name]

    def _read_into(self, out: np.ndarray, name: str, start: int) -> None:
        """Fill ``out`` uint8 with a tensor's bytes from ``start`` on."""
        if out.size:
            file = self._open()
            self._verify_blocks(file, name, start, start + out.size)
            file.read_into(out.data, self._entries[name].start + start)

    def _verify_blocks(self, file: "_OpenFile", name: str, start: int, stop: int) -> None:
        """Verify the blocks of a tensor's bytes start ... stop - 1, each once."""
        entry, verified = self._entries[name], self._verified[name]
        if entry.checksums is None:
            return
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if not verified[block]:
                first = block * BLOCK_BYTES
                data = memoryview(bytearray(min(BLOCK_BYTES, entry.size - first)))
                file.read_into(data, entry.start + first)
                if zlib.crc32(data).to_bytes(4, "big") != entry.checksums[4 * block : 4 * block + 4]:
                    raise InputError(f"{self.path}: damaged: block {block} of {name} does not have its checksum")
                verified[block] = 1

    def _open(self) -> "_OpenFile":
        """The file's descriptor.  Of a file that was written since the last read, all blocks are verified again."""
        file = _open(self.path)
        if file.version != self._version:
            if _read_header(self.path, required=False)[2] != self.header_digest:
                raise InputError(f"{self.path}: expected an unchanged file, but another one has replaced it")
            self._verified = {name: bytearray(len(blocks)) for name, blocks in self._verified.items()}
            self._version = file.version
        return file


def load_tensors(path: str | Path, *, checksums: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and its metadata, verified; see `TensorFile` for the arguments and errors."""
    file = TensorFile(path, checksums=checksums)
    return {name: file.tensor(name) for name in file.names}, file.metadata


_preadv = getattr(os, "preadv", None)  # saves one copy where the system has it


class _OpenFile:
    """An open descriptor, closed with the last reference: a thread that reads from it keeps it open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.version = _version(os.fstat(self.descriptor))

    def read_into(self, place: memoryview, offset: int) -> None:
        # Positioned reads, because processes that were forked share the position of a descriptor.
        while len(place):
            if _preadv is not None:
                count = _preadv(self.descriptor, [place], offset)
            else:
                data = os.pread(self.descriptor, len(place), offset)
                count = len(data)
                place[:count] = data
            if not count:
                raise InputError(f"{self.path}: damaged: it ends early")
            place, offset = place[count:], offset + count

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open_files: "OrderedDict[Path, _OpenFile]" = OrderedDict()


def _open(path: Path) -> _OpenFile:
    """The file at ``path``, opened or from the last few that were used."""
    file = _open_files.pop(path, None)
    try:
        if file is None or file.version != _version(path.stat()):
            file = _OpenFile(path)
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file, found nothing") from None
    _open_files[path] = file
    while len(_open_files) > _OPEN_FILES:
        _open_files.pop(next(iter(_open_files), path), None)
    return file


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_header(path: Path, *, required: bool) -> tuple[dict[str, str], dict[str, _Entry], str]:
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
            raise InputError(f"{path}: damaged or not a safetensors file")
        text = file.read(length)
    try:
        header = parse_json(text, path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata")
        sums = _checksums(path, text, metadata.pop(_KEY, None))
        if sums is None and required:
            raise InputError(f"{path}: damaged: it has no checksums")
        entries = {name: _entry(name, value, 8 + length, sums) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            detail = str(error).removeprefix(f"{path}: ")
            raise InputError(f"{path}: damaged or not a safetensors file ({detail})") from None
        raise InputError(f"{path}: damaged or not a safetensors file of a known kind") from None
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size)):
        if entry.start != end:
            raise InputError(f"{path}: damaged: its tensors overlap or leave gaps")
        end += entry.size
    if end != size:
        raise InputError(f"{path}: damaged: expected {end} bytes, got {size}")
    return metadata, entries, hashlib.sha256(text).hexdigest()


def _entry(name: str, value: dict[str, Any], begin: int, sums: dict[str, str] | None) -> _Entry:
    dtype, shape, (start, stop) = _DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise TypeError("shape")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("shape")
    checksums = None if sums is None else bytes.fromhex(sums[name])
    if checksums is not None and len(checksums) != 4 * -(-(stop - start) // BLOCK_BYTES):
        raise ValueError("checksums")
    return _Entry(dtype, shape, begin + start, stop - start, checksums)


def _checksums(path: Path, header: bytes, text: str | None) -> dict[str, str] | None:
    """The checksums of the tensors, after a check of the header's own; None in a file without any."""
    if text is None:
        return None
    sums = parse_json(text.encode(), path)
    if sums["algorithm"] != "crc32" or sums["block_bytes"] != BLOCK_BYTES:
        raise InputError(f"{path}: has checksums of an unknown kind ({sums['algorithm']}); a newer revq may read it")
    cleared = _HEADER_FIELD.sub(lambda match: match[1] + _UNSET.encode() + match[3], header, count=1)
    if f"{zlib.crc32(cleared):08x}" != sums["header"]:
        raise InputError(f"{path}: damaged: its header does not have its checksum")
    return sums["tensors"]


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's elements in order, uint8 ``[size]``."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
