"""JSON texts: every defect of a text that is read becomes one clear `InputError`; manifests carry a checksum.

A manifest is a JSON object that a program writes and people do not edit.  Its last entry, ``checksum``, is the CRC-32, as
eight hexadecimal digits, of the object's compact form with sorted keys and without that entry.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any, NoReturn

from revq.errors import InputError


def parse_json(text: bytes, label: str | Path) -> dict[str, Any]:
    """The object that a JSON text holds.

    Args:
        text: UTF-8, with or without a byte order mark.
        label: what errors name as the place of the text.

    Raises:
        InputError: if the text is not UTF-8, not JSON or not an object, nests too deeply, repeats a key, or holds a number
            that is not finite (NaN, Infinity, 1e999).
    """
    try:
        decoded = text.decode("utf-8-sig")
        value = json.loads(
            decoded, parse_float=_finite, parse_int=_integer, parse_constant=_refuse, object_pairs_hook=_unique
        )
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: expected UTF-8 text, got byte {text[error.start]:#04x} at {error.start}") from None
    except RecursionError:
        raise InputError(f"{label}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{label}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{label}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, see `parse_json`.

    Raises:
        InputError: also if the file is missing or is a folder.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected a JSON file, found {'something else' if path.exists() else 'nothing'}")
    return parse_json(path.read_bytes(), path)


def manifest_text(values: dict[str, Any]) -> str:
    """The text of a manifest with these values."""
    return json.dumps({**values, "checksum": _checksum(values)}, indent=1) + "\n"


def read_manifest(path: str | Path, *, unchecked: frozenset[str | None] = frozenset()) -> dict[str, Any]:
    """The values that `manifest_text` was given.

    Args:
        path: a file with the text of a manifest.
        unchecked: values of the entry ``format`` whose manifests were written without a checksum; None for no entry.

    Raises:
        InputError: see `read_json`; also if the values do not have the checksum.
    """
    values = read_json(path)
    checksum = values.pop("checksum", None)
    if checksum is None and values.get("format") in unchecked:
        return values
    if checksum != _checksum(values):
        raise InputError(f"{path}: damaged: its values do not have their checksum")
    return values


def _checksum(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {text[:40]}")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:  # Python itself stops only at 4,300 digits
        raise ValueError(f"expected an integer of at most 64 bits, got {text[:40]}")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"expected a finite number, got {text}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return values
