"""Texts such as the names of a million images inside a tensor file: two tensors, from which each text is read on demand."""

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import torch

from revq.data.tensor_file import TensorFile, TensorFileWriter
from revq.errors import InputError

_CHUNK = 4096


class TextBuffer:
    """Texts that are collected before they are written, in one byte string instead of a million objects."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._data, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, text: str) -> None:
        """Add one text.  File names that are not UTF-8 keep their bytes, which Python represents by lone surrogates."""
        self._data += encode_text(text)
        self._ends.append(len(self._data))

    def write(self, writer: TensorFileWriter, name: str) -> None:
        """Write the tensors ``<name>.bytes`` uint8 and ``<name>.ends`` int64 ``[n + 1]``."""
        writer.add(f"{name}.bytes", torch.from_numpy(np.frombuffer(bytes(self._data), np.uint8).copy()))
        writer.add(f"{name}.ends", torch.from_numpy(np.array(self._ends, np.int64)))

    @property
    def nbytes(self) -> int:
        """Bytes of the two tensors."""
        return len(self._data) + 8 * len(self._ends)


class TextList(Sequence[str]):
    """The texts that `TextBuffer.write` wrote; reads what is asked for.

    Raises:
        InputError: if the file does not hold them.
    """

    def __init__(self, file: TensorFile, name: str) -> None:
        self._file, self._bytes, self._ends = file, f"{name}.bytes", f"{name}.ends"
        shapes = (file.shape(self._bytes), file.shape(self._ends))
        dtypes = (file.dtype(self._bytes), file.dtype(self._ends))
        if dtypes != (torch.uint8, torch.int64) or len(shapes[0]) != 1 or len(shapes[1]) != 1 or shapes[1][0] < 1:
            raise InputError(f"{file.path}: expected {name} as bytes and their ends, got {shapes} of {dtypes}")
        self._size = shapes[0][0]

    def __len__(self) -> int:
        return self._file.shape(self._ends)[0] - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._range(start, max(start, stop))
            return [self[number] for number in range(start, stop, step)]
        number = range(len(self))[index]  # negative numbers and IndexError as everywhere
        return self._range(number, number + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            yield from self._range(start, min(start + _CHUNK, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # compared by content, like a list

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 3 else ""
        return f"TextList([{', '.join(map(repr, self[:3]))}{more}], length {len(self)})"

    def _range(self, start: int, stop: int) -> list[str]:
        ends = self._file.rows(self._ends, start, stop + 1).tolist()
        if ends != sorted(ends) or not 0 <= ends[0] <= ends[-1] <= self._size:
            raise InputError(f"{self._file.path}: damaged: {self._ends} are not in order")
        data = self._file.rows(self._bytes, ends[0], ends[-1]).numpy().tobytes()
        pairs = itertools.pairwise(ends)
        return [data[low - ends[0] : high - ends[0]].decode("utf-8", "surrogateescape") for low, high in pairs]


def encode_text(text: str) -> bytes:
    """The bytes of a text as files hold it.

    Raises:
        InputError: for half of a surrogate pair, which is no text.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InputError(f"name: expected a text, got {text!r}, which UTF-8 cannot represent") from None
