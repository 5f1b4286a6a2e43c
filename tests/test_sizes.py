"""Files stay small enough to read in one sitting."""

import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("revq", "revq_kernels", "csrc", "benchmarks", "tests", "scripts")
SUFFIXES = {".py", ".cpp", ".h", ".inl", ".cu"}


def lines_per_file() -> dict[str, int]:
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES] + [ROOT / "setup.py"]
    return {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}


def test_no_file_over_400_lines():
    long = {name: lines for name, lines in lines_per_file().items() if lines > 400}
    assert not long, long


def test_median_under_150_lines():
    lines = lines_per_file()
    assert len(lines) > 30
    assert statistics.median(lines.values()) < 150


def test_no_drawers():
    drawers = [name for name in lines_per_file() if Path(name).stem in {"util", "utils", "helpers", "misc", "common"}]
    assert not drawers, drawers
