"""The rows of `python -m benchmarks.drop_in` as the table of docs/drop-in.md."""

from pathlib import Path

from benchmarks.harness.rows import RESULTS
from benchmarks.tables import markdown, read, source

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"

HEADER = [
    *("quantizer", "d", "K", "N", "ms, evaluation", "ms, training step", "MB, evaluation", "MB, training"),
    "% wrong codes: float32 / bfloat16 autocast / patched in autocast",
]


def drop_in_table(folder: Path = RESULTS) -> str:
    """One line per quantizer: before -> after."""
    if not (folder / "drop-in.csv").exists():
        return "Not measured yet: `python -m benchmarks.drop_in`."
    rows = read("drop-in", folder)
    lines = []
    for row in (row for row in rows if row["mode"] == "evaluation"):
        step = next((r for r in rows if r["quantizer"] == row["quantizer"] and r["mode"] != "evaluation"), None)
        wrong = " / ".join(row[f"wrong_{which}"] or "-" for which in ("original", "original_bf16", "patched_bf16"))
        memory = [_memory(one) for one in (row, step)]
        lines.append([*(row[key] for key in ("quantizer", "d", "K", "N")), _time(row), _time(step), *memory, wrong])
    return markdown(HEADER, lines) + source(rows[0]) + f" {rows[0]['packages']}; medians of {rows[0]['rounds']} rounds."


def _time(row: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    return f"{float(row['original_ms']):.0f} -> {float(row['patched_ms']):.1f} (**{float(row['times']):.1f}x**)"


def _memory(row: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    return " -> ".join(row[f"{which}_mb"] for which in ("original", "patched"))
