"""The log of a run: one JSON record a line, in a file that `tail -f`, pandas and the loss plot read."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from revq.data.atomic import atomic_file
from revq.errors import InputError


class Tracker:
    """Appends records to a JSONL file; each is on the file when `log` returns.

    Args:
        path: the file; its folder is made.
        step: where the run stands.  Records of later steps, and a last line that a kill cut short, are dropped: a resumed
            run writes them again.
    """

    def __init__(self, path: str | Path, *, step: int = 0) -> None:
        self.path = Path(path)
        kept = [record for record in read_records(self.path) if record["step"] <= step] if step else []
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(_line(record) for record in kept))
        self._file = self.path.open("a")

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
    """The records of a log, in order; a last line without its end is left out; a missing file has none.

    Raises:
        InputError: if a line is not a record.
    """
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: expected a JSON record with a step") from None
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
