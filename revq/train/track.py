"""The log of a run: one JSON record per line, for `tail -f`, pandas and the plot of the losses."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from revq.data.atomic import atomic_file
from revq.data.json_text import parse_json
from revq.errors import InputError

_RENAMED = {
    "utilisation": "utilization",  # codespell:ignore utilisation
    "lowest_utilisation": "lowest_utilization",  # codespell:ignore utilisation
    "validation_quantised": "validation_quantized",  # codespell:ignore quantised
}
"""Keys of the records of older logs, and their names today."""


class Tracker:
    """Appends records to a JSONL file; each is in the file when `log` returns.

    Args:
        path: the file; its folder is created.
        step: the step from which the run continues.  Records of later steps, and a last line that is incomplete because
            the run was killed, are removed; the resumed run writes them again.
    """

    def __init__(self, path: str | Path, *, step: int = 0) -> None:
        self.path = Path(path)
        kept = [record for record in read_records(self.path) if record["step"] <= step] if step else []
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, **record: Any) -> None:
        """Append one record; it must have a ``step``."""
        self._file.write(_line(record))
        self._file.flush()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log, in order; without an incomplete last line; none if the file is missing.

    Early logs have three keys in British spelling; their values are returned under the present names.

    Raises:
        InputError: if a line is not a record, or holds a number that is not finite.
    """
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        values = parse_json(line, f"{path}, line {number}")
        record = {_RENAMED.get(key, key): value for key, value in values.items()}
        if type(record.get("step")) is not int or record["step"] < 0:
            raise InputError(f"{path}, line {number}: expected a JSON record with a step")
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
