"""The token file: ceil(log2 K) bits per index (1 if K = 1); every sample starts on a byte boundary.

So the tokens of one sample can be unpacked without those of the others.

A token file is a safetensors file with one tensor ``tokens`` uint8 ``[B, ceil(T * bits / 8)]``; its metadata holds a JSON
text under ``revq`` with the format, T, K, the samples' names and the model's fingerprint.  Index t of a sample occupies
bits t*bits ... (t+1)*bits - 1 of its row, lowest bit first; bit i of a row is bit i mod 8 of byte i // 8.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from revq.data.atomic import atomic_file
from revq.errors import InputError

FORMAT = "revq-tokens-1"


@dataclass(frozen=True)
class TokenFile:
    """The content of a token file."""

    indices: Tensor
    """int64 ``[B, T]``, each in [0, K)."""
    num_codes: int
    """K, the number of codes of the codebook."""
    names: tuple[str, ...]
    """One name per sample."""
    model: str
    """`revq.tokenizer.token_fingerprint` of the model that made the tokens, or empty."""


def bits_per_index(num_codes: int) -> int:
    """ceil(log2 K), but 1 for K = 1."""
    return max(1, (num_codes - 1).bit_length())


def save_tokens(
    path: str | Path, indices: Tensor, num_codes: int, *, names: Sequence[str] | None = None, model: str = ""
) -> None:
    """Write ``indices`` int64 ``[B, T]`` of a codebook of K = ``num_codes`` codes, atomically.

    Raises:
        ValueError: if indices is not a matrix of integers in [0, K), or there are not B names.
    """
    if indices.dim() != 2 or indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"indices: expected integers [B, T], got {indices.dtype} {tuple(indices.shape)}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_codes:
        raise ValueError(
            f"indices: expected values in [0, {num_codes}), got {int(indices.min())} to {int(indices.max())}"
        )
    names = [str(row) for row in range(indices.shape[0])] if names is None else list(names)
    if len(names) != indices.shape[0]:
        raise ValueError(f"names: expected one per sample, {indices.shape[0]}, got {len(names)}")
    about = {"format": FORMAT, "num_tokens": indices.shape[1], "num_codes": num_codes, "names": names, "model": model}
    packed = torch.from_numpy(pack(indices.cpu().numpy(), bits_per_index(num_codes)))
    with atomic_file(path) as temporary:
        save_file({"tokens": packed}, temporary, metadata={"revq": json.dumps(about)})


def load_tokens(path: str | Path) -> TokenFile:
    """Read what `save_tokens` wrote.

    Raises:
        InputError: if the file is missing, damaged, of another format, or holds an index that is not in [0, K).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such token file")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["revq"])
            packed = file.get_tensor("tokens").numpy()
        if about["format"] != FORMAT:
            raise ValueError("another format")
        num_tokens, num_codes = int(about["num_tokens"]), int(about["num_codes"])
        names, model = tuple(str(name) for name in about["names"]), str(about["model"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged or not a token file of this format ({FORMAT})") from None
    bits = bits_per_index(num_codes)
    expected = (len(names), -(-num_tokens * bits // 8))
    if min(num_tokens, num_codes) < 1 or packed.dtype != np.uint8 or packed.shape != expected:
        raise InputError(f"{path}: expected tokens uint8 {expected}, got {packed.dtype} {packed.shape}")
    indices = unpack(packed, num_tokens, bits)
    if indices.size and indices.max() >= num_codes:
        raise InputError(f"{path}: expected indices below {num_codes}, got {indices.max()}")
    return TokenFile(torch.from_numpy(indices), num_codes, names, model)


def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """Integers ``[B, T]`` below 2**bits -> uint8 ``[B, ceil(T * bits / 8)]``."""
    out = np.empty((indices.shape[0], -(-indices.shape[1] * bits // 8)), np.uint8)
    for row, sample in enumerate(
        indices.astype(np.uint64)
    ):  # one sample at a time: before packbits, every bit takes a whole element
        ones = (sample[:, None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)  # [T, bits]
        out[row] = np.packbits(ones.astype(np.uint8).reshape(-1), bitorder="little")
    return out


def unpack(packed: np.ndarray, num_tokens: int, bits: int) -> np.ndarray:
    """The inverse of `pack`: uint8 ``[B, bytes]`` -> int64 ``[B, T]``."""
    weights = np.left_shift(1, np.arange(bits), dtype=np.int64)
    out = np.empty((packed.shape[0], num_tokens), np.int64)
    for row, sample in enumerate(packed):
        ones = np.unpackbits(sample, bitorder="little", count=num_tokens * bits)
        out[row] = ones.reshape(num_tokens, bits) @ weights
    return out
