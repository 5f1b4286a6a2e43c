"""Rows of results: their provenance, the CSV files that hold them, and Markdown tables of them."""

import csv
import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"


def provenance(command: str) -> Row:
    """The columns that say where a result comes from; see `commit_of`."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit_of(Path.cwd()),
        "machine": f"{_cpu_name()}, {platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": command,
    }


def commit_of(checkout: Path) -> str:
    """The commit of a checkout; "+" after it means local changes, "unknown" that it is not under git."""
    git = ("git", "-C", str(checkout))
    commit = _output(*git, "rev-parse", "--short", "HEAD")
    dirty = _output(*git, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!docs")
    return (commit or "unknown") + ("+" if dirty else "")


def gpu_columns() -> Row:
    """The columns that name a GPU, its driver and its present clocks (MHz)."""
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
    """An installed package's version; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write(name: str, rows: list[Row], folder: Path = RESULTS) -> Path:
    """Write rows to ``<folder>/<name>.csv``, replacing the file as a whole, and return its path."""
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

    def __init__(self, name: str, folder: Path, source: Row) -> None:
        self.name, self.folder, self.source = name, folder, source
        self.rows: list[Row] = []

    def add(self, rows: list[Row]) -> None:
        """Append rows of the same columns, and rewrite the file."""
        self.rows += [{**row, **{key: value for key, value in self.source.items() if key not in row}} for row in rows]
        if self.rows:
            write(self.name, self.rows, self.folder)


def read(name: str, folder: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of ``<folder>/<name>.csv``."""
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def source(row: dict[str, str]) -> str:
    """The sentence below a table that names its origin."""
    return (
        f"\n\n`{row['command']}`, {row['date']}, commit {row['commit']}, {row['machine']}, {row['threads']} threads, "
        f"torch {row['torch']}, Python {row['python']}."
    )


def _output(*command: str) -> str:
    """The output of a command; nothing if the command is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
