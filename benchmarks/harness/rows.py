"""A row names its machine, versions, commit and command; files of rows are CSV in long format."""

import csv
import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def provenance(command: str | None = None) -> dict[str, Any]:
    """The columns that say where a number comes from; the command is the running module's unless given."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    dirty = _output("git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!docs")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (commit or "unknown") + ("+" if dirty else ""),
        "machine": f"{_cpu_name()}, {platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": command or "python -m " + _module_name(Path(sys.argv[0]).resolve()),
    }


def card() -> dict[str, Any]:
    """The columns that name a CUDA card, its driver and its clocks as they are now (MHz)."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    device = torch.cuda.current_device()
    answer = _output("nvidia-smi", f"--id={device}", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    values = [value.strip() for value in answer.split(",")] if answer else []
    driver, clock, largest, memory = values if len(values) == 4 else ["unknown"] * 4
    return {
        "card": torch.cuda.get_device_name(device),
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "sm_mhz": clock,
        "sm_max_mhz": largest,
        "memory_mhz": memory,
    }


def version(package: str) -> str:
    """An installed package's version, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write rows to ``<folder>/<name>.csv`` and return its path; a file of that name is replaced whole."""
    path = folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
    return path


class Rows:
    """Rows that are on disk as soon as they exist: an interrupted run keeps what it measured."""

    def __init__(self, name: str, folder: Path, source: dict[str, Any]) -> None:
        self.name, self.folder, self.source = name, folder, source
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows of the same columns, and rewrite the file."""
        self.rows += [{**row, **{key: value for key, value in self.source.items() if key not in row}} for row in rows]
        if self.rows:
            write(self.name, self.rows, self.folder)


def _output(*command: str) -> str:
    """What a command prints; nothing if it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _module_name(path: Path) -> str:
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    return path.with_suffix("").as_posix().replace("/", ".")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
