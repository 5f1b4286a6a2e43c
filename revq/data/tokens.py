"""The token file: the indices of many samples, packed to as many bits as the codebooks need.

A token file is a safetensors file with checksums (`revq.data.tensor_file`).  Its tensor ``tokens`` uint8 ``[B, bytes]``
holds one sample per row.  Position t of a sample has K_t codes and takes w_t = max(1, ceil(log2 K_t)) bits; its index lies
in the bits w_0 + ... + w_(t-1) and following of the row, lowest bit first; bit i of a row is bit i mod 8 of byte i // 8.
``names.bytes`` and ``names.ends`` hold the samples' names, ``labels`` int64 ``[B]`` their classes if they have any, and
``skipped.*`` and ``reasons.*`` the images that could not be read.  The metadata entry ``revq`` is a JSON text: format, T, K
(one number, or a list of one per position) and the model's fingerprint.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revq.data.atomic import atomic_file
from revq.data.json_text import parse_json
from revq.data.listing import SkippedFile
from revq.data.tensor_file import TensorFile, TensorFileWriter
from revq.data.text_list import TextBuffer, TextList
from revq.errors import InputError

FORMAT = "revq-tokens-2"
_FIRST_FORMAT = "revq-tokens-1"  # K is one number, the names are in the JSON text, there are no checksums
_MOST_CODES = 1 << 32
_CHUNK_BITS = 1 << 22
"""Bits that are unpacked at a time: each takes a byte meanwhile."""


def bits_per_index(num_codes: int) -> int:
    """ceil(log2 K), but 1 for K = 1."""
    return max(1, (num_codes - 1).bit_length())


class TokenFile:
    """A token file, open for reading; a map-style dataset of samples that is pickled by its path.

    Attributes:
        path: the file's absolute path.
        num_tokens: T, tokens per sample.
        codes_per_position: K_t of each of the T positions.
        names: one name per sample, read on demand.
        model: `revq.tokenizer.token_fingerprint` of the model that made the tokens, or empty.

    Raises:
        InputError: if the file is missing, damaged, of another format or of a newer version; later, if a block that is
            read is damaged or holds an index that is not in [0, K_t).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise InputError(f"{path}: no such token file")
        self._file = TensorFile(self.path, checksums=False)
        about = self._about()
        first = about["format"] == _FIRST_FORMAT
        if not first:
            self._file = TensorFile(self.path)
        try:
            self.num_tokens, codes, self.model = _count(about["num_tokens"]), about["num_codes"], str(about["model"])
            codes = codes if isinstance(codes, list) else [codes] * self.num_tokens
            self.codes_per_position: tuple[int, ...] = tuple(map(_count, codes))
            names = [str(name) for name in about["names"]] if first else TextList(self._file, "names")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: damaged or not a token file of this format ({FORMAT}): {error}") from None
        self.names: Sequence[str] = names
        self._widths = np.array([bits_per_index(codes) for codes in self.codes_per_position])
        found = (self._file.shape("tokens"), self._file.dtype("tokens"))
        expected = (len(self.names), -(-int(self._widths.sum()) // 8))
        if len(self.codes_per_position) != self.num_tokens or found != (expected, torch.uint8):
            raise InputError(f"{path}: expected tokens uint8 {expected}, got {found[1]} {found[0]}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, sample: int) -> Tensor:
        """The indices of one sample: int64 ``[T]``."""
        number = range(len(self))[sample]
        return self._unpack(self._file.rows("tokens", number, number + 1))[0]

    def __getitems__(self, samples: Sequence[int]) -> list[Tensor]:
        """Several samples; a `torch.utils.data.DataLoader` fetches its batches by this method."""
        numbers = np.array([range(len(self))[sample] for sample in samples], np.int64)
        order = np.argsort(numbers, kind="stable")
        indices = self._unpack(self._file.gather("tokens", numbers[order]))
        return list(indices[torch.from_numpy(np.argsort(order))])

    def rows(self, start: int, stop: int) -> Tensor:
        """The indices of the samples start ... stop - 1: int64 ``[stop - start, T]``."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"start and stop: expected 0 <= start <= stop <= {len(self)}, got {start} and {stop}")
        return self._unpack(self._file.rows("tokens", start, stop))

    def batches(self, size: int) -> Iterator[Tensor]:
        """All samples in order, ``size`` at a time: int64 ``[<= size, T]``."""
        for start in range(0, len(self), size):
            yield self.rows(start, min(start + size, len(self)))

    @property
    def indices(self) -> Tensor:
        """All indices, in memory: int64 ``[B, T]``."""
        return self.rows(0, len(self))

    @property
    def num_codes(self) -> int:
        """K, the number of codes of a codebook; the largest, where they differ."""
        return max(self.codes_per_position)

    @property
    def bits_per_sample(self) -> int:
        """Bits of the tokens of one sample."""
        return int(self._widths.sum())

    @property
    def labels(self) -> Tensor | None:
        """int64 ``[B]``, or None if the file has no labels."""
        return self._file.tensor("labels") if "labels" in self._file.names else None

    @property
    def skipped(self) -> list[SkippedFile]:
        """The images that could not be read: name and reason."""
        if "skipped.ends" not in self._file.names:
            return []
        return list(map(SkippedFile, TextList(self._file, "skipped"), TextList(self._file, "reasons")))

    def verify(self) -> None:
        """Read the whole file.

        Raises:
            InputError: if a block is damaged, or an index is not in [0, K_t).
        """
        self._file.verify()
        for _ in self.batches(4096):
            pass

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "header": self._file.header_digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]  # a pickle holds the path alone
        if self._file.header_digest != state["header"]:
            raise InputError(f"{self.path}: expected the tokens that were pickled, but the file has changed")

    def _about(self) -> dict[str, Any]:
        try:
            about = parse_json(self._file.metadata["revq"].encode(), self.path)
            format_ = about["format"]
        except (KeyError, InputError):
            raise InputError(f"{self.path}: damaged or not a token file of this format ({FORMAT})") from None
        if format_ in (FORMAT, _FIRST_FORMAT):
            return about
        if isinstance(format_, str) and format_.startswith("revq-tokens-"):
            raise InputError(f"{self.path}: expected {FORMAT} or older, got {format_}: a newer revq wrote it")
        raise InputError(f"{self.path}: damaged or not a token file of this format ({FORMAT})")

    def _unpack(self, packed: Tensor) -> Tensor:
        indices = unpack(packed.numpy(), self._widths)
        if indices.size and (wrong := indices >= np.array(self.codes_per_position)).any():
            sample, position = np.argwhere(wrong)[0].tolist()
            raise InputError(
                f"{self.path}: expected indices below {self.codes_per_position[position]} at position {position}, "
                f"got {indices[sample, position]}"
            )
        return torch.from_numpy(indices)


class TokenWriter:
    """Writes a token file sample by sample; it gets its name when the block ends without an error.

    Args:
        path: the file.
        num_tokens: T.
        num_codes: K, or one number per position.
        max_samples: upper bound of B.
        model: fingerprint of the model.

    Raises:
        ValueError: for sizes that are not positive.
    """

    def __init__(
        self, path: str | Path, *, num_tokens: int, num_codes: int | Sequence[int], max_samples: int, model: str = ""
    ) -> None:
        codes = [num_codes] * num_tokens if isinstance(num_codes, int) else list(num_codes)
        if num_tokens < 1 or len(codes) != num_tokens or not all(1 <= count <= _MOST_CODES for count in codes):
            raise ValueError(f"num_codes: expected positive numbers for {num_tokens} >= 1 positions, got {num_codes}")
        self._codes, self._widths = np.array(codes), np.array([bits_per_index(count) for count in codes])
        one = codes[0] if len(set(codes)) == 1 else codes
        self._about = {"format": FORMAT, "num_tokens": num_tokens, "num_codes": one, "model": model}
        self._path, self._max_samples = path, max_samples
        self._names, self._skipped, self._reasons = TextBuffer(), TextBuffer(), TextBuffer()
        self._labels: list[int] = []
        self._atomic: AbstractContextManager[Path] | None = None

    def __enter__(self) -> "TokenWriter":
        self._atomic = atomic_file(self._path)
        temporary = self._atomic.__enter__()
        row_bytes = -(-int(self._widths.sum()) // 8)
        # Names are not known yet; four kilobytes is the longest path of a file.
        size = self._max_samples * (row_bytes + 3 * 4096)
        self._writer = TensorFileWriter(temporary, max_bytes=size, max_text=256 + len(json.dumps(self._about)))
        self._writer.begin("tokens", torch.uint8, [row_bytes])
        return self

    def append(self, indices: Tensor, names: Sequence[str], labels: Sequence[int] | None = None) -> None:
        """Append samples: integers ``[B, T]`` in [0, K_t), one name and, in all calls or in none, one label each.

        Raises:
            ValueError: for another shape, dtype or range.
        """
        if indices.dim() != 2 or indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise ValueError(f"indices: expected integers [B, T], got {indices.dtype} {tuple(indices.shape)}")
        if indices.shape[1] != len(self._codes):
            raise ValueError(f"indices: expected T={len(self._codes)} tokens per sample, got {indices.shape[1]}")
        for what, values in (("names", names), ("labels", labels)):
            if values is not None and len(values) != len(indices):
                raise ValueError(f"{what}: expected one per sample, {len(indices)}, got {len(values)}")
        integers = indices.detach().cpu().numpy().astype(np.int64)
        if integers.size and ((integers < 0) | (integers >= self._codes)).any():
            codes = self._about["num_codes"]
            raise ValueError(f"indices: expected values in [0, {codes}), got {integers.min()} to {integers.max()}")
        self._writer.append(torch.from_numpy(pack(integers, self._widths)))
        for name in names:
            self._names.append(name)
        self._labels += [] if labels is None else [int(label) for label in labels]

    def skip(self, name: str, reason: str) -> None:
        """Note an image that could not be read."""
        self._skipped.append(name)
        self._reasons.append(reason)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._atomic is not None  # for the type checker
        with ExitStack() as stack:
            stack.push(self._atomic.__exit__)
            stack.callback(self._writer.abandon)
            if kind is None:
                self._names.write(self._writer, "names")
                if self._labels:
                    self._writer.add("labels", torch.tensor(self._labels, dtype=torch.int64))
                if len(self._skipped):
                    self._skipped.write(self._writer, "skipped")
                    self._reasons.write(self._writer, "reasons")
                self._writer.close({"revq": json.dumps(self._about)})
            elif error is not None:
                raise error


def save_tokens(
    path: str | Path,
    indices: Tensor,
    num_codes: int | Sequence[int],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    model: str = "",
) -> None:
    """Write ``indices`` integers ``[B, T]`` of a codebook of K = ``num_codes`` codes, or of K_t codes at position t.

    Raises:
        ValueError: if indices is not a matrix of integers in [0, K_t), or there are not B names.
    """
    if indices.dim() != 2:
        raise ValueError(f"indices: expected integers [B, T], got {indices.dtype} {tuple(indices.shape)}")
    names = [str(row) for row in range(indices.shape[0])] if names is None else names
    writer = TokenWriter(
        path, num_tokens=indices.shape[1], num_codes=num_codes, max_samples=indices.shape[0], model=model
    )
    with writer:
        writer.append(indices, names, labels)


def load_tokens(path: str | Path) -> TokenFile:
    """Open what `save_tokens` or `TokenWriter` wrote; see `TokenFile` for errors."""
    return TokenFile(path)


def pack(indices: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Integers ``[B, T]`` -> uint8 ``[B, bytes]``; index t takes ``widths[t]`` bits."""
    total = int(widths.sum())
    out = np.empty((indices.shape[0], -(-total // 8)), np.uint8)
    position, place = _bit_places(widths)
    step = max(1, _CHUNK_BITS // max(1, total))
    for start in range(0, len(indices), step):
        values = indices[start : start + step].astype(np.uint64)[:, position]  # [b, total]: each bit its index
        ones = ((values >> place) & np.uint64(1)).astype(np.uint8)
        out[start : start + step] = np.packbits(ones, axis=1, bitorder="little")
    return out


def unpack(packed: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The inverse of `pack`: uint8 ``[B, bytes]`` -> int64 ``[B, T]``."""
    total, starts = int(widths.sum()), np.cumsum([0, *widths[:-1]])
    out = np.empty((packed.shape[0], len(widths)), np.int64)
    _, place = _bit_places(widths)
    step = max(1, _CHUNK_BITS // max(1, total))
    for start in range(0, len(packed), step):
        ones = np.unpackbits(packed[start : start + step], axis=1, bitorder="little", count=total)
        values = ones.astype(np.int64) << place.astype(np.int64)
        out[start : start + step] = np.add.reduceat(values, starts, axis=1)
    return out


def _bit_places(widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each bit of a row: the position whose index it belongs to, and its place in that index."""
    position = np.repeat(np.arange(len(widths)), widths)
    starts = np.cumsum([0, *widths[:-1]])
    return position, (np.arange(int(widths.sum())) - starts[position]).astype(np.uint64)


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_CODES:
        raise ValueError(f"expected a positive integer, got {value!r}")
    return value
