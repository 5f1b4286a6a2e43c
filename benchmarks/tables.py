"""Reading rows and writing them as Markdown, for every report."""

import csv
from pathlib import Path

from benchmarks.harness.rows import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def read(name: str, folder: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of ``<folder>/<name>.csv``."""
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(row: dict[str, str]) -> str:
    """The sentence under a table that names its origin."""
    return (
        f"\n\n`{row['command']}`, {row['date']}, commit {row['commit']}, {row['machine']}, {row['threads']} threads, "
        f"torch {row['torch']}, Python {row['python']}."
    )
